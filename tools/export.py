"""Write the weights of a checkpoint as safetensors, with a model file that needs PyTorch only.

    python tools/export.py run.pt OUT_DIR

OUT_DIR must be new or empty. The files in it work without this repository:

    model.safetensors   the weights with which the last validation was made, averages included
    model.py            the model in plain PyTorch, cut out of train_gpt.py, and `load`
    config.json         the model's shape, its tokenizer, and the run that the weights come from
    README.md           lines that load them, compute logits and draw text
"""

import argparse
import inspect
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from records.missing import explain_missing

    explain_missing()

from sample import END_OF_TEXT, load_model, tokenizer_name  # puts the root on the path
from torch import device

import train_gpt

PARTS = "Linear", "RMSNorm", "rotary_table", "rotate", "Attention", "MLP", "Block"  # of train_gpt

MODEL = '''\
"""A GPT-2 with rotary embeddings, in plain PyTorch. `load` reads the weights beside this file.

Cut out of train_gpt.py by tools/export.py. It needs torch and safetensors.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn


{parts}


class GPT(nn.Module):
{init}

{logits}

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Return the logits of each next token, (B, T, vocab_size), in float32."""
        cos, sin = (table[: tokens_BT.size(1)] for table in self.rotary)
        x = self.norm1(self.embed(tokens_BT))
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.logits(self.norm2(x))


def load(folder: str | Path = Path(__file__).parent, device: str = "cpu") -> GPT:
    """Return the model of a folder that tools/export.py wrote, with its weights."""
    shape = json.loads(Path(folder, "config.json").read_text())["model"]
    shape["dtype"] = getattr(torch, shape["dtype"])
    model = GPT(**shape, device=torch.device(device))
    model.load_state_dict(load_file(Path(folder, "model.safetensors"), device=device))
    return model.eval()
'''

README = """\
# Exported weights

Made from `{name}`: {facts}. `config.json` has the model's shape. In this folder, with
`pip install {packages}`, this continues a text:

```python
{imports}
from model import load

model, end = load(), {end}  # this token begins each document
ids = [end, *{encode}]
with torch.no_grad():
    for _ in range(100):
        logits = model(torch.tensor([ids[-{row_tokens}:]]))  # (1, tokens, vocabulary)
        p = (logits[0, -1, :end] / 0.7).softmax(-1)
        ids += p.multinomial(1).tolist()
print({decode})
```
"""
TEXT = {  # by tokenizer
    "bytes": dict(
        packages="torch safetensors",
        imports="import torch",
        encode='"def ".encode()',
        decode='bytes(ids[1:]).decode(errors="replace")',
    ),
    "gpt2": dict(
        packages="torch safetensors tiktoken",
        imports='import tiktoken\nimport torch\n\ngpt2 = tiktoken.get_encoding("gpt2")',
        encode='gpt2.encode("The sea")',
        decode="gpt2.decode(ids[1:])",
    ),
}


def model_source() -> str:
    """Return a file with GPT's modules as they stand, and its forward pass."""
    found = [getattr(train_gpt, name) for name in PARTS]
    found += [train_gpt.GPT.__init__, train_gpt.GPT.logits]
    *parts, init, logits = (inspect.getsource(part).rstrip() for part in found)
    init = init.replace("`initialise` fills", "`load` fills")
    return MODEL.format(parts="\n\n\n".join(parts), init=init, logits=logits)


def check_empty(out: Path) -> None:
    """Raise ValueError if `out` is there and is no empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists, expected a new or an empty folder: name another OUT_DIR")


def export(checkpoint: Path, out: Path) -> None:
    """Write the four files; ValueError or FileNotFoundError before the first if that cannot be."""
    try:
        from safetensors.torch import save_file
    except ModuleNotFoundError:
        raise ValueError("safetensors is not installed: run pip install safetensors") from None
    check_empty(out)
    model, config, saved = load_model(checkpoint, device("cpu"))
    if config.model != "gpt":
        raise ValueError(
            f"{checkpoint} holds a model {config.model!r}, but only gpt has a model file"
        )
    name, shape = tokenizer_name(config), config.scoped("model")
    run = {key: saved["config"][key] for key in ("preset", "optimizer")}
    run |= dict(seed=saved.get("seed"), step=saved.get("step"))
    run |= dict(val_loss=saved["points"][-1][1]) if saved.get("points") else {}
    del shape["model"]
    about = dict(model=shape, tokenizer=name, end_of_text=END_OF_TEXT[name], run=run)
    facts = ", ".join(f"{key} {value}" for key, value in run.items())
    lines = TEXT[name] | dict(end=END_OF_TEXT[name], row_tokens=config.row_tokens, facts=facts)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(about, indent=2) + "\n")
    (out / "model.py").write_text(model_source())
    (out / "README.md").write_text(README.format(name=checkpoint.name, **lines))
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(weights, out / "model.safetensors")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", metavar="CKPT", type=Path)
    parser.add_argument("out", metavar="OUT_DIR", type=Path, help="a new or an empty folder")
    args = parser.parse_args(argv)
    try:
        export(args.checkpoint, args.out)
    except (ValueError, OSError) as error:
        print(f"export.py: {error}", file=sys.stderr)
        return 2
    print((args.out / "README.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
