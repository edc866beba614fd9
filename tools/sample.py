"""Print text from a checkpoint that `train_gpt.py --checkpoint` wrote.

    python tools/sample.py run.pt --prompt "The sea" [--tokens 100] [--temperature 0.7] [--top-k 0]

The settings in the checkpoint define the model, and the size of its vocabulary the tokenizer: 257
is bytes (256 begins a document), 50304 is tiktoken's gpt2. The model reads the end-of-text token,
which begins every document, and then the prompt. It never draws that token. The same seed gives the
same text on the same machine.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

if __name__ == "__main__":
    from records.missing import explain_missing

    explain_missing()

import train_gpt  # noqa: E402, I001 (first: its clock starts before torch is imported)
import torch  # noqa: E402
from data.tokenize_text import Tokenizer, load_tokenizer  # noqa: E402
from models.generate import generate  # noqa: E402
from models.world import choose_device  # noqa: E402
from records.checkpoint import read_checkpoint, restore  # noqa: E402
from records.options import shared  # noqa: E402
from torch import nn  # noqa: E402

TOKENIZERS = {257: "bytes", 50304: "gpt2"}  # by the size of the vocabulary
END_OF_TEXT = {"bytes": 256, "gpt2": 50256}


def load_model(path: Path, device: torch.device) -> tuple[nn.Module, train_gpt.Config, dict]:
    """Return the model of a checkpoint in eval mode, its settings, and the whole checkpoint.

    It has the weights that were validated. Only settings of its shape are used, and nothing is
    compiled. FileNotFoundError if there is no file; ValueError if it is no checkpoint, or if its
    weights do not fit its settings or are not finite.
    """
    defaults = train_gpt.Config()
    saved = read_checkpoint(path, {}, train_gpt.asdict(defaults))
    try:
        shape = {name: saved["config"][name] for name in defaults.scoped("model")}
        config = train_gpt.Config(**shape, compile=False)
        model = train_gpt.build_model(config, device)
        model.load_state_dict(saved["model"])
        if saved.get("around"):
            read_out(model, saved)
    except (LookupError, TypeError, RuntimeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} is no whole checkpoint of this trainer, {reason}") from None
    if what := nonfinite(model):
        raise ValueError(f"{path} holds {what} that are not finite: its run diverged, name another")
    return model.eval(), config, saved


def read_out(model: nn.Module, saved: dict) -> None:
    """Give the model the weights of the checkpoint's validation, which may be averages."""
    settings = shared(saved["config"], train_gpt.Config) | dict(compile=False)
    optimizer = train_gpt.build_optimizer(model, train_gpt.Config(**settings))
    restore(saved, model, optimizer)
    with optimizer.readout():
        weights = {name: w.clone() for name, w in model.state_dict().items()}
    model.load_state_dict(weights)


@torch.no_grad()
def nonfinite(model: nn.Module) -> str:
    """Return the name of weights that are not finite, "logits" if these are not, or ""."""
    for name, weights in model.named_parameters():
        if not weights.isfinite().all():
            return name
    token = torch.zeros(1, 1, dtype=torch.long, device=weights.device)
    return "" if model.logits(model.hidden(token)).isfinite().all() else "logits"


def tokenizer_name(config: train_gpt.Config) -> str:
    """Return the tokenizer's name, or raise ValueError if none has this vocabulary."""
    if (name := TOKENIZERS.get(config.vocab_size)) is None:
        raise ValueError(f"no tokenizer has {config.vocab_size} tokens, expected {TOKENIZERS}")
    return name


def tokenizer_of(config: train_gpt.Config) -> tuple[Tokenizer, Callable[[list[int]], str]]:
    """Return the tokenizer, and a function that decodes ids below end_of_text.

    ValueError if no tokenizer has this vocabulary or tiktoken is not installed; FileNotFoundError
    if tiktoken cannot load its tables.
    """
    name = tokenizer_name(config)
    try:
        tokenizer = load_tokenizer(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{name} needs {error.name}: run pip install {error.name}") from None
    if name == "bytes":
        return tokenizer, lambda ids: bytes(ids).decode("utf-8", errors="replace")
    import tiktoken

    return tokenizer, tiktoken.get_encoding(name).decode


def sample(
    path: Path,
    device: torch.device,
    prompt: str,
    tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
) -> str:
    """Continue the prompt by `tokens` tokens. Temperature 0 is greedy; top_k 0 draws from all."""
    model, config, _ = load_model(path, device)
    tokenizer, decode = tokenizer_of(config)
    ids = [tokenizer.end_of_text, *tokenizer.encode(prompt)]
    if temperature < 1e-6:  # logits are at most 15, so smaller divisors could overflow
        temperature, top_k = 1.0, 1
    top_k = min(top_k, tokenizer.end_of_text)
    draws = config.row_tokens, seed, temperature, top_k
    return decode(generate(model, ids, tokens, *draws)[1:])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", metavar="CKPT", type=Path)
    parser.add_argument("--prompt", default="", help="the beginning of the text (default: empty)")
    parser.add_argument("--tokens", type=int, default=100, help="how many to draw (default: 100)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest; 0: all")
    parser.add_argument("--seed", type=int, default=1, help="seed of the draws (default: 1)")
    parser.add_argument("--device", default="", help="cuda, mps or cpu (default: first here)")
    args = parser.parse_args(argv)
    if min(args.tokens, args.top_k, args.seed) < 0 or not 0 <= args.temperature < float("inf"):
        parser.error("--tokens, --temperature, --top-k and --seed must be finite and 0 or more")
    try:
        options = args.prompt, args.tokens, args.temperature, args.top_k, args.seed
        print(sample(args.checkpoint, choose_device(args.device), *options))
    except (FileNotFoundError, ValueError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
