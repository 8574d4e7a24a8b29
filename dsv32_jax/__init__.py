"""DeepSeek-V3.2 in JAX and Flax NNX: sparse attention from training to agents.

Packages, each importing only those before it: `model`, `weights`, `data`,
`training`, `generation`, `agents`, `verifiers`, `rl`, `distillation`, `evals`.
"""
