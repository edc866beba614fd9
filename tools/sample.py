"""Prints text from a checkpoint that `train_gpt.py --checkpoint` wrote.

    python tools/sample.py run.pt --prompt "The sea" [--tokens 100] [--temperature 0.7] [--top-k 0]

The model is built from the settings in the checkpoint. Its vocabulary says what a token is: 257 are
the bytes (256 begins a document), 50304 those of tiktoken's gpt2. The text begins as documents do,
with the end-of-text token, then comes the prompt; that token itself is never drawn. The same seed
gives the same text on the same machine.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import train_gpt  # noqa: E402, I001 (first: its clock starts before torch is imported)
import torch  # noqa: E402
from data.tokenize_text import Tokenizer, load_tokenizer  # noqa: E402

TOKENIZERS = {257: "bytes", 50304: "gpt2"}  # by the vocabulary of the model


def load_model(path: Path, device: torch.device) -> tuple[train_gpt.GPT, train_gpt.Config, dict]:
    """The model of a checkpoint, ready to evaluate, with its settings and all that was saved.

    Only the settings that shape the model are read; it is not compiled. FileNotFoundError without
    such a file, ValueError where it is no checkpoint or holds other weights than its settings say.
    """
    saved = train_gpt.read_checkpoint(path, train_gpt.Config(), same=())
    try:
        shape = {name: saved["config"][name] for name in train_gpt.MODEL}
        config = train_gpt.Config(**shape, compile=False)
        model = train_gpt.build_model(config, device)
        model.load_state_dict(saved["model"])
    except (LookupError, TypeError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} is no whole checkpoint of this trainer, {reason}") from None
    return model.eval(), config, saved


def tokenizer_of(config: train_gpt.Config) -> tuple[Tokenizer, Callable[[list[int]], str]]:
    """What turns text into ids, and a function from ids, all below end_of_text, to text.

    ValueError for a vocabulary of no known tokenizer, or where tiktoken is not installed;
    FileNotFoundError where it cannot load its tables.
    """
    if (name := TOKENIZERS.get(config.vocab_size)) is None:
        raise ValueError(f"no tokenizer has {config.vocab_size} tokens, expected {TOKENIZERS}")
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
    """The prompt and `tokens` more. Temperature 0 takes the likeliest, top_k 0 draws from all."""
    model, config, _ = load_model(path, device)
    tokenizer, decode = tokenizer_of(config)
    ids = [tokenizer.end_of_text, *tokenizer.encode(prompt)]
    if temperature < 1e-6:  # logits reach 15: their quotient stays far from infinity
        temperature, top_k = 1.0, 1
    top_k = min(top_k, tokenizer.end_of_text)
    return decode(train_gpt.generate(model, ids, tokens, seed, temperature, top_k)[1:])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", metavar="CKPT", type=Path)
    parser.add_argument("--prompt", default="", help="what the text begins with (default: nothing)")
    parser.add_argument("--tokens", type=int, default=100, help="to draw (default: 100)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest; 0: all")
    parser.add_argument("--seed", type=int, default=1, help="of the draws (default: 1)")
    parser.add_argument("--device", default="", help="cuda, mps or cpu; default: the first here")
    args = parser.parse_args(argv)
    if min(args.tokens, args.top_k, args.seed) < 0 or not 0 <= args.temperature < float("inf"):
        parser.error("--tokens, --temperature, --top-k and --seed are finite and 0 or more")
    try:
        how = args.prompt, args.tokens, args.temperature, args.top_k, args.seed
        print(sample(args.checkpoint, train_gpt.choose_device(args.device), *how))
    except (FileNotFoundError, ValueError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
