"""The shipped configurations are valid, and the main job is one job in both its forms."""

import runpy
from pathlib import Path

import pytest

from federa.config import config_digest, load_config
from federa.study import load_study

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda file: file.stem)
def test_configurations_load(file):
    assert load_config(file).server.rounds > 1


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("studies/*.yaml")), ids=lambda file: file.stem)
def test_studies_load(file):
    """Every cell's run is configured; each method has at least three rates to choose from."""
    study = load_study(file)
    assert study.config.seeds and all(len(study.points(kind)) >= 3 for kind in study.kinds)


def test_the_main_job_in_python_is_the_one_of_make_run():
    config = runpy.run_path(str(EXAMPLES / "federated_finetune.py"))["config"]
    assert config_digest(load_config(config)) == config_digest(load_config(EXAMPLES / "stdlib_docs.yaml"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_instruction_tuning_answers_questions_it_was_never_asked(family, tmp_path):
    """Trained, exported, loaded by transformers and generating: one answer in ten would be right by chance."""
    example = runpy.run_path(str(EXAMPLES / "instruction_tuning.py"))
    assert example["main"](family, str(tmp_path)) >= 0.5


def test_what_peft_starts_from_beside_ours(minilm_path):
    pytest.importorskip("peft")
    example = runpy.run_path(str(EXAMPLES / "compare_svd_with_peft.py"))
    (lost, change), (our_lost, our_change) = example["compare"](example["real_weight"]()).values()
    assert 1e-4 < lost < 0.1 and 0.05 < change < 1
    assert our_lost <= 1e-6 and our_change == 0
