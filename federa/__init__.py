"""federa: federated low-rank fine-tuning of language models at the cost of the frozen model.

run(config, output) -> RunResult   a whole simulated run
resume(output) -> RunResult        takes up a stopped one, bitwise
load_config(source, overrides)     a validated Config
InputError, RunError               the two ways to fail
"""

from importlib import import_module

__version__ = "0.1.0"
__all__ = ["Config", "InputError", "RunError", "RunResult", "load_config", "resume", "run"]

_HOMES = {
    "Config": "federa.config",
    "load_config": "federa.config",
    "InputError": "federa.errors",
    "RunError": "federa.errors",
    "RunResult": "federa.simulation",
    "resume": "federa.simulation",
    "run": "federa.simulation",
}


def __getattr__(name: str):
    """Imports a public name at its first use, so that `import federa` and `federa --help` load no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'federa' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
