"""Asks the Hugging Face hub one short question before anything is loaded from it."""

import functools
from typing import Literal

TIMEOUT = 10.0  # seconds


@functools.cache
def ask_hub(kind: Literal["model", "dataset"], name: str, revision: str | None = None) -> str | None:
    """None if the hub has it, else what is wrong in a few words, within TIMEOUT and without retries."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    api = HfApi()
    try:
        (api.model_info if kind == "model" else api.dataset_info)(name, revision=revision, timeout=TIMEOUT)
    except OfflineModeIsEnabled:
        return "the hub is switched off (offline mode)"
    except GatedRepoError:
        return f"the hub gives {name} only to those it admits; `hf auth login` says who you are"
    except RevisionNotFoundError:
        return f"the hub has no revision {revision} of it"
    except (RepositoryNotFoundError, HFValidationError):
        return f"the hub has no {kind} {name}"
    except HfHubHTTPError as error:
        return f"the hub answered {error.response.status_code}"
    except Exception as error:  # requests, httpx and OS errors of many kinds: each means that it did not answer
        return f"the hub did not answer ({type(error).__name__})"
    return None
