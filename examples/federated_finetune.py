"""The main job from Python: FeDeRA on all-MiniLM-L6-v2, 20 clients with different labels, a PEFT adapter at the end.

python examples/federated_finetune.py [FOLDER]
"""

import sys

import federa


def watch(event, facts):
    """Called as things happen: "ready", "client", "round", "scored"."""
    if event == "round":
        accuracy = facts["validation"]["accuracy"]
        print(f"round {facts['round']:2d}  loss {facts['train_loss']:.3f}  validation accuracy {accuracy:.1%}")


config = {
    "model": {"name": "sentence-transformers/all-MiniLM-L6-v2"},
    "data": {"name": "stdlib-docs", "max_length": 64},  # or "path": a folder with train.jsonl and test.jsonl
    "partition": {"scheme": "dirichlet_label", "alpha": 0.5, "clients": 20},
    "method": {"name": "federa", "rank": 8},
    "client": {"lr": 1e-3, "head_lr": 1e-2, "batch_size": 16, "epochs": 1},
    "server": {"rounds": 10, "clients_per_round": 10},
    "evaluation": {"test_every": 1},  # for the curves; nothing is chosen by the test set
}

if __name__ == "__main__":
    output = sys.argv[1] if len(sys.argv) > 1 else "runs/federated_finetune"
    result = federa.run(config, output, watch=watch)
    print(f"test accuracy {result.accuracy:.1%}, best round by validation {result.best['round']}")
    print(f"{result.facts['trainable_parameters']:,} of {result.facts['total_parameters']:,} parameters trained")

    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForSequenceClassification

    name = PeftConfig.from_pretrained(result.adapter).base_model_name_or_path
    base = AutoModelForSequenceClassification.from_pretrained(name, num_labels=15)
    model = PeftModel.from_pretrained(base, result.adapter)
    print(f"peft loads {result.adapter}: {sum(p.numel() for p in model.parameters()):,} parameters")
