"""The ahead-of-time program, run as its users run it."""

import json
import os
import subprocess
import sys

import pytest

from dsv32_jax.model import presets
from dsv32_jax.training import stages
from dsv32_jax.training import step_flops


def compile_for(*arguments, **environment):
  command = [sys.executable, "-m", "experiments.compile_for", *arguments]
  return subprocess.run(
    command,
    check=False,
    capture_output=True,
    text=True,
    timeout=280,
    env=os.environ | environment,
  )


def assert_one_line(finished, told):
  assert finished.returncode == 1
  assert finished.stderr.startswith("error: ")
  assert len(finished.stderr.splitlines()) == 1
  assert told in finished.stderr


def test_reports_a_step_on_forced_cpu_devices(tmp_path):
  output = tmp_path / "report.json"
  finished = compile_for(
    "--topology=cpu:2",
    "--config=configs/tiny.py:pretrain",
    "--config.mesh.data=1",
    "--config.mesh.context=2",
    "--config.data.batch_size=2",
    "--config.data.sequence_length=64",
    f"--output={output}",
  )
  assert finished.returncode == 0, finished.stderr
  report = json.loads(output.read_text())
  assert (report["chips"], report["devices"]) == (2, 2)
  assert report["fits"] and report["hbm_bytes_per_device"] is None
  assert (report["global_batch"], report["sequence_length"]) == (2, 64)
  # Half of the weights and of both moments.
  assert report["argument_bytes_per_device"] > 0
  assert report["temporary_bytes_per_device"] > 0
  wanted = step_flops.count(presets.tiny(), stages.PRETRAIN, 2, 64)
  assert report["model_flops_per_step"] == wanted.total
  # Gradients of matrices go back in shares; whole go those of norms, which are
  # a thousandth of the state.
  moved = report["collective_bytes_per_device"]
  assert moved["reduce-scatter"] > 0.2 * report["argument_bytes_per_device"]
  assert moved["all-reduce"] < 1e-3 * report["argument_bytes_per_device"]
  assert report["sorts"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["prefill", "decode"])
def test_reports_a_step_of_serving(variant, tmp_path):
  output = tmp_path / "report.json"
  finished = compile_for(
    "--topology=cpu:4",
    f"--config=configs/deepseek_v32_671b.py:{variant}",
    "--config.model.num_layers=2",
    "--config.model.num_dense_layers=1",
    "--config.model.num_experts=16",
    "--config.model.num_expert_groups=4",
    "--config.model.width=256",
    "--config.model.vocab_size=512",
    "--config.model.index_top_k=64",
    "--config.mesh.expert=2",
    "--config.mesh.tensor=2",
    "--config.batch_size=2",
    "--config.max_length=256",
    f"--config.new_tokens={1 if variant == 'decode' else 64}",
    f"--output={output}",
  )
  assert finished.returncode == 0, finished.stderr
  report = json.loads(output.read_text())
  assert (report["global_batch"], report["sequence_length"]) == (2, 256)
  # The cache of two layers for half of the sequences, bfloat16.
  assert report["argument_bytes_per_device"] > 2 * 256 * (576 + 128) * 2
  assert report["collectives"]["all-to-all"] > 0, "no expert exchange"


@pytest.mark.slow
def test_reports_a_step_of_grpo(tmp_path):
  output = tmp_path / "report.json"
  arguments = (
    "--config=configs/rl.py:tiny",
    "--config.model.num_layers=2",
    "--config.mesh.data=1",
    "--config.mesh.expert=2",
    f"--output={output}",
  )
  finished = compile_for("--topology=cpu:2", *arguments)
  assert finished.returncode == 0, finished.stderr
  report = json.loads(output.read_text())
  assert report["argument_bytes_per_device"] > 0
  assert report["model_flops_per_step"] > 0
  finished = compile_for(
    "--topology=cpu:2",
    *arguments,
    "--config.prompts=1",
    "--config.group_size=3",
  )
  assert_one_line(finished, "do not divide over the 2 shards")


def test_gpus_are_counted_by_hand(tmp_path):
  arguments = (
    "--config=configs/deepseek_v32_671b.py:sparse",
    "--config.mesh.expert=8",
    "--config.mesh.context=16",
    "--config.microbatches=30",
    f"--output={tmp_path / 'report.json'}",
  )
  finished = compile_for("--topology=h200:256", *arguments)
  assert finished.returncode == 0, finished.stderr
  report = json.loads((tmp_path / "report.json").read_text())
  assert report["fits"] and "compile_seconds" not in report
  assert_one_line(
    compile_for("--topology=h200:8", *arguments), "the mesh is of 256 devices"
  )
  program = compile_for(
    "--topology=h200:256", *arguments, f"--program={tmp_path / 'program'}"
  )
  assert_one_line(program, "--topology=h200:256 nothing is compiled")
  assert not (tmp_path / "program").exists()
  # Half of the nodes do not hold it.
  finished = compile_for(
    "--topology=h200:128", *arguments, "--config.mesh.fsdp=1"
  )
  assert finished.returncode == 2


def sparse_step(output, **mesh):
  """Compiles a small sparse step for eight devices; (report, stderr)."""
  finished = compile_for(
    "--topology=cpu:8",
    "--config=configs/tiny.py:sparse",
    "--config.stage.attention_form=gathered",
    "--config.model.num_layers=2",
    "--config.model.num_mtp_layers=0",
    "--config.mesh.data=1",
    *(f"--config.mesh.{axis}={size}" for axis, size in mesh.items()),
    "--config.data.batch_size=8",
    "--config.data.sequence_length=64",
    f"--output={output}",
    # A program from the cache would pass without a word.
    JAX_ENABLE_COMPILATION_CACHE="false",
  )
  assert finished.returncode == 0, finished.stderr
  return json.loads(output.read_text()), finished.stderr


@pytest.mark.slow
def test_a_sparse_step_exchanges_experts_and_gathers_by_parts(tmp_path):
  report, _ = sparse_step(tmp_path / "report.json", fsdp=2, expert=2, context=2)
  assert report["sorts"] == 0
  assert report["collectives"]["all-to-all"] > 0, "no expert exchange"
  assert 1 < report["most_gathered"] < 8


@pytest.mark.slow
def test_a_sparse_step_copies_no_array_everywhere(tmp_path):
  _, told = sparse_step(tmp_path / "report.json", fsdp=2, context=4)
  # What the partitioner says where it knows no better.
  assert "full rematerialization" not in told


def test_sequences_that_do_not_divide_are_named():
  finished = compile_for(
    "--topology=cpu:2",
    "--config=configs/tiny.py:pretrain",
    "--config.mesh.data=2",
    "--config.data.batch_size=3",
  )
  assert finished.returncode == 1
  assert "a microbatch has 3 sequences" in finished.stderr


@pytest.mark.parametrize(
  "topology,told",
  [
    ("v9:2x2", "generation 'v9' is not cpu or one of v5e"),
    ("cpu:none", "must be cpu:DEVICES"),
    ("cpu:99999999999999999999", "must be cpu:DEVICES, at most 4096"),
    ("cpu:3", "mesh="),
  ],
)
def test_a_wrong_topology_is_one_line(topology, told):
  finished = compile_for(
    f"--topology={topology}",
    "--config=configs/tiny.py:pretrain",
    "--config.mesh.data=2",
  )
  assert_one_line(finished, told)


@pytest.mark.parametrize(
  "arguments,told",
  [
    (["--output={file}/report.json"], "Not a directory"),
    (["--output={folder}"], "Is a directory"),
    (["--output={folder}/missing/report.json"], "No such file"),
    (["--output="], "--output is empty"),
    (["--output={folder}/a", "--program={folder}/a"], "are both"),
    (["--config.stage.kernels=tpu"], "kernels='tpu' cannot be compiled for"),
  ],
)
def test_what_cannot_end_well_is_refused_at_once(tmp_path, arguments, told):
  file = tmp_path / "file"
  file.write_text("kept")
  finished = compile_for(
    "--topology=cpu:1",
    "--config=configs/tiny.py:pretrain",
    *(part.format(file=file, folder=tmp_path) for part in arguments),
  )
  assert_one_line(finished, told)
  assert "compiling for" not in finished.stdout
  assert [path.name for path in tmp_path.iterdir()] == ["file"]
  assert file.read_text() == "kept"
