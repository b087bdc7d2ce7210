"""federa: federated low-rank fine-tuning of language models at the cost of the frozen model.

run(config, output)  a whole simulated run -> RunResult        resume(folder)  takes up a stopped one
load_config(...)     a validated Config                         InputError, RunError  the two ways to fail
"""

from federa.config import Config, load_config
from federa.errors import InputError, RunError
from federa.simulation import RunResult, resume, run

__version__ = "0.1.0"
__all__ = ["Config", "InputError", "RunError", "RunResult", "load_config", "resume", "run"]
