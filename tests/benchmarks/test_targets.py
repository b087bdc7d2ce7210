"""Goals against hand-made records."""

import pytest

from benchmarks import targets
from benchmarks.targets import TARGETS, Target, geometric_mean, verdicts

FP32, BF16, SMALL, LLAMA, ROBERTA, CLIENTS = TARGETS


def record(ratio, M=512, provider="ours", threads=1, refused=None, **others):
    environment = {"kind": "cpu", "device": "CPU", "threads": threads}
    sizes = {"M": M, "N": 768, "K": 768, "R": 16} | others.pop("sizes", {})
    return {
        "group": "RoBERTa", "dtype": "fp32", "mode": "eager", "phase": "fwd+bwd", "provider": provider, "sizes": sizes,
        "ratio": ratio, "refused": refused, "environment": environment,
    } | others  # fmt: skip


def test_geometric_mean():
    assert geometric_mean([0.5, 2.0]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("ratios", "met"), [((0.80, 0.90), True), ((0.5, 0.96), False), ((0.94, 0.94), False), ((0.85, 0.85), True)]
)
def test_mean_and_worst_row_both_count(ratios, met):
    ((found, line),) = verdicts(FP32, [record(ratio, M) for ratio, M in zip(ratios, (512, 2048), strict=True)])
    assert found == met and line.startswith("PASS" if met else "FAIL")
    assert f"{geometric_mean(ratios):.3f}" in line and f"{max(ratios):.3f}" in line


def test_rows_of_other_sizes_and_phases_do_not_count():
    rows = [record(0.8), record(9.0, M=256), record(9.0, sizes={"R": 64}), record(9.0, phase="fwd"),
            record(9.0, provider="peft"), record(9.0, dtype="bf16")]  # fmt: skip
    assert [met for met, _ in verdicts(FP32, rows)] == [True]
    assert [met for met, _ in verdicts(SMALL, rows)] == [False]


def test_each_number_of_threads_has_its_own_line():
    found = verdicts(FP32, [record(0.8, threads=1), record(0.99, threads=2)])
    assert [met for met, _ in found] == [True, False]
    assert "1 thread:" in found[0][1] and "2 threads:" in found[1][1]


def test_a_refused_row_misses_the_goal_and_none_leaves_it_open():
    ((met, line),) = verdicts(FP32, [record(0.8), record(None, 2048, refused="wrong: dA")])
    assert met is False and "wrong: dA" in line
    ((met, line),) = verdicts(BF16, [record(0.8)])
    assert met is None and "not measured" in line


def test_gpu_goals_look_at_the_gpu_they_name():
    gpu = {"kind": "cuda", "device": "NVIDIA H200", "threads": 8}
    row = record(1.05, 8192, dtype="bf16", mode="graph", environment=gpu)
    assert verdicts(ROBERTA, [row])[0][0] is True
    assert verdicts(ROBERTA, [row | {"environment": gpu | {"device": "NVIDIA H100"}}])[0][0] is None
    assert verdicts(ROBERTA, [row | {"mode": "eager"}])[0][0] is None
    assert verdicts(LLAMA, [row | {"group": "Llama-3-8B", "ratio": 1.2}])[0][0] is False
    clients = row | {"sizes": row["sizes"] | {"C": 32, "cut": "zipf"}}
    assert verdicts(CLIENTS, [clients])[0][0] is True


def test_the_command_ends_with_one_where_a_goal_is_missed(monkeypatch, capsys):
    goal = Target("toy", "toy", "cpu", lambda row: True, (1.0, None), (0.9, None))
    monkeypatch.setattr(targets, "TARGETS", (goal,))
    for ratio, status in ((0.95, 0), (1.05, 1)):
        rows = [record(ratio)]
        monkeypatch.setattr(targets.store, "read", lambda path, rows=rows: rows if path.stem == "toy-cpu" else [])
        assert targets.main([]) == status
    assert "must 1.0, aim 0.9" in capsys.readouterr().out
