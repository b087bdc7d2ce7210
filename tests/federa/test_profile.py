"""`federa run --profile`: where a round's time went."""

import json

from rich.console import Console

from federa.config import changed
from federa.profile import RoundProfile
from federa.simulation import run


def test_the_first_round_is_told_and_traced(tiny_config, tmp_path):
    console, heard = Console(record=True, width=120), []
    profile = RoundProfile(lambda event, facts: heard.append(event), tmp_path / "trace.json", console)
    result = run(changed(tiny_config, server={"rounds": 2}), tmp_path / "run", watch=profile)
    text = console.export_text()
    assert "profile  round 1: train" in text and "evaluate" in text and "round 2" not in text
    assert "LoraLinear" in text or "lora_linear" in text or "addmm" in text
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert heard[0] == "ready" and heard[-1] == "scored" and heard.count("round") == 2 == len(result.records) - 1
