"""Continue a prompt with a Mamba checkpoint, printing the text as it is written.

    python examples/generate.py DIRECTORY --prompt "The selective scan" --temperature 0.8 --top-p 0.9

DIRECTORY is what `jax_sscan.models.load_pretrained` reads: a checkpoint of transformers or of state-spaces/mamba, or
what examples/train_lm.py wrote. Its tokenizer.json is used if the tokenizers package is there (pip install tokenizers);
a model of 256 tokens reads and writes bytes.
"""

import argparse
import codecs
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from jax_sscan.models import MambaLM, load_pretrained, sample


def text_codec(
    directory: Path, vocab_size: int
) -> tuple[Callable[[str], list[int]], Callable[[Iterator[int]], Iterator[str]]]:
    """How this model turns text into tokens, and a stream of tokens into pieces of text."""
    file = directory / "tokenizer.json"
    if file.exists():
        try:
            from tokenizers import Tokenizer
        except ModuleNotFoundError:
            sys.exit(f"generate.py: {file} needs the tokenizers package: pip install tokenizers")
        tokenizer = Tokenizer.from_file(str(file))

        def pieces(tokens: Iterator[int]) -> Iterator[str]:
            # A character may take several tokens: what ends in the middle of one is held back.
            ids: list[int] = []
            shown = ""
            for token in tokens:
                ids.append(token)
                text = tokenizer.decode(ids)
                if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                    yield text[len(shown) :]
                    shown = text

        return lambda text: tokenizer.encode(text).ids, pieces
    if vocab_size != 256:
        sys.exit(f"generate.py: no {file}, and a model of {vocab_size} tokens does not read bytes")
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return lambda text: list(text.encode()), lambda tokens: (decoder.decode(bytes([token])) for token in tokens)


def stream(
    model: MambaLM, prompt: list[int], count: int, key: jax.Array, **sampling: float | int | None
) -> Iterator[int]:
    """The tokens after the prompt, one by one."""

    @nnx.jit
    def step(model: MambaLM, tokens: jax.Array, cache, key: jax.Array):
        hidden, cache = model.hidden_states(tokens, cache, return_cache=True)
        return sample(model.logits(hidden[:, -1]), key, **sampling), cache  # pyright: ignore[reportArgumentType]

    tokens, cache = jnp.asarray([prompt], jnp.int32), None
    stop = model.config.eos_token_id
    stops = {stop} if isinstance(stop, int) else set(stop or ())
    for number in range(count):
        token, cache = step(model, tokens, cache, jax.random.fold_in(key, number))
        if int(token[0]) in stops:
            return
        yield int(token[0])
        tokens = token[:, None]


def main() -> None:
    """Loads, reads the prompt and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--prompt", default="import ")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--bfloat16", action="store_true", help="load and compute in bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = load_pretrained(args.directory, param_dtype=jnp.bfloat16 if args.bfloat16 else None)
    encode, decode = text_codec(args.directory, model.config.vocab_size)
    prompt = encode(args.prompt)
    if not prompt:
        parser.error("--prompt must not be empty")
    sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    print(args.prompt, end="", flush=True)
    for piece in decode(stream(model, prompt, args.max_new_tokens, jax.random.key(args.seed), **sampling)):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
