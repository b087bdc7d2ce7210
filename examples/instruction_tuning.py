"""Instruction tuning of a causal language model from Python: clients teach a tiny Llama or Qwen answers by rote.

python examples/instruction_tuning.py [llama|qwen3] [FOLDER]

The model is made here, of the real class and with random weights, so that the example needs no hub and no GPU. For a
real one, put its name in the place of `tiny_model(...)`, and your files in the place of `conversations(...)`.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import federa
from federa.export import export
from federa.simulation import restore

CAPITALS = {
    **{"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon", "Austria": "Vienna"},
    **{"Poland": "Warsaw", "Norway": "Oslo", "Sweden": "Stockholm", "Greece": "Athens", "Ireland": "Dublin"},
}
QUESTIONS = (
    "What is the capital of {}?",
    "Name the capital of {}.",
    "Which city is the capital of {}?",
    "{}: what is its capital?",
    "Tell me the capital city of {}.",
    "I am off to {}. What is the capital?",
)
CHAT = (  # Qwen's; federa brings a template of its own where a tokenizer has none
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def conversations(folder: Path) -> Path:
    """train.jsonl and test.jsonl with the columns messages and country; every country is tested on one question that it
    was never asked in training."""
    rows: dict[str, list[str]] = {"train": [], "test": []}
    for number, (country, city) in enumerate(CAPITALS.items()):
        for index, question in enumerate(QUESTIONS):
            asked = {"role": "user", "content": question.format(country)}
            messages = [asked, {"role": "assistant", "content": f"It is {city}."}]
            split = "test" if index == number % len(QUESTIONS) else "train"
            rows[split].append(json.dumps({"messages": messages, "country": country}))
    folder.mkdir(parents=True, exist_ok=True)
    for split, lines in rows.items():
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def tiny_model(family: str, folder: Path) -> Path:
    """A random model of two layers with a byte-level tokenizer, as `from_pretrained` loads it."""
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=marks, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([*CAPITALS, *CAPITALS.values(), *QUESTIONS, "It is ."], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=marks[0],
        eos_token=marks[2],
        chat_template=CHAT if family == "qwen3" else None,
    )
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    size |= {"vocab_size": len(tokenizer), "intermediate_size": 128, "max_position_embeddings": 256}
    size |= {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2, "initializer_range": 0.2}
    kinds = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}
    if family == "qwen3":
        size["head_dim"] = 16
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(kinds[family](**size)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def watch(event, facts):
    if event == "round" and facts["round"] % 5 == 0:
        print(f"round {facts['round']:2d}  perplexity of the answers {facts['test']['perplexity']:.2f}")


def main(family: str = "llama", output: str = "runs/instruction_tuning") -> float:
    """Trains, exports and asks; returns the share of the test questions that are answered right."""
    folder = Path(output)
    config = {
        "task": {"name": "causal-lm"},
        "model": {"name": str(tiny_model(family, folder / "model")), "device": "cpu"},
        "data": {"path": str(conversations(folder / "data")), "messages": "messages", "client": "country"},
        "partition": {"scheme": "natural"},  # a client knows one country
        "method": {"name": "federa", "rank": 16},
        "client": {"lr": 1e-2, "batch_size": 8, "epochs": 2},
        "server": {"rounds": 30},
        "evaluation": {"test_every": 5, "every": 5},
    }
    result = federa.run(config, folder / "run", watch=watch)
    print(f"perplexity {result.score:.2f}, adapter in {result.adapter}")

    experiment, _ = restore(folder / "run")
    merged = folder / "merged"
    if not merged.is_dir():
        export(experiment, "merged", merged)
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    model = transformers.AutoModelForCausalLM.from_pretrained(merged)
    right = 0
    tests = [json.loads(line)["messages"] for line in (folder / "data" / "test.jsonl").open()]
    for asked, expected in tests:
        prompt = tokenizer.apply_chat_template(
            [asked], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        prompt.pop("token_type_ids", None)
        said = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        answer = tokenizer.decode(said, skip_special_tokens=True).strip()
        right += answer == expected["content"]
        print(f"{asked['content']:45} {answer}")
    print(f"{right} of {len(tests)} questions answered right")
    return right / len(tests)


if __name__ == "__main__":
    main(*sys.argv[1:])
