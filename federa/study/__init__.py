"""Fair comparisons: a grid of methods, data, heterogeneity and seeds, every method with its own learning rate."""

from federa.study.dry_run import dry_run
from federa.study.grid import Study, load_study
from federa.study.runner import run_study

__all__ = ["Study", "dry_run", "load_study", "run_study"]
