"""Operations of DeepSeek-V3.2 as kernels: one folder each, jax only.

`bitmask` and `visibility` define the two layouts that the operations share: a
packed selection, and which keys a query may see at all.
"""
