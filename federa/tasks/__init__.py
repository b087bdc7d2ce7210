"""What a model learns to predict: columns -> examples -> losses -> scores. One object a task, chosen by task.name."""

from federa.config import TaskConfig
from federa.tasks.answering import QuestionAnswering
from federa.tasks.classification import Classification, EntityClassification, PairClassification
from federa.tasks.language import CausalLM
from federa.tasks.tagging import TokenClassification
from federa.tasks.task import Predictions, Task, mean_features

__all__ = [
    "CLASSIFICATION",
    "TASKS",
    "Predictions",
    "Task",
    "client_scores",
    "losses",
    "make_task",
    "mean_features",
    "predict",
    "score",
]

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        Classification,
        PairClassification,
        EntityClassification,
        TokenClassification,
        QuestionAnswering,
        CausalLM,
    )
}
CLASSIFICATION = Classification()
losses, predict, score, client_scores = (  # of the default task
    CLASSIFICATION.losses,
    CLASSIFICATION.predict,
    CLASSIFICATION.score,
    CLASSIFICATION.client_scores,
)


def make_task(config: TaskConfig) -> Task:
    """The task that a configuration names."""
    return TASKS[config.name](config)
