"""Speed of scoring the options of questions, compared with a plain transformers script.

    python benchmarks/scoring.py --size 135m --output scoring.json

Random questions of four options are scored by `Scorer`, as `moe-jax evaluate` does, and by the
script that a user of transformers would write: batches of sequences sorted by length and padded to
the longest, one forward pass each, `log_softmax` of all logits, and a sum over the option's tokens.
Both have the same base and sequences, are timed alternately in one process, and must give the same
scores of the base. The script has no adapter: its seconds are those of the base in
every row. Compilation is not in the seconds; it is a column of its own.

Needs torch and transformers, as the tests do.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.decode import KINDS, decoder, random_adapter
from benchmarks.report import check_output, machine, one_line, refuse, write_json
from benchmarks.sizes import SIZE_HELP, hf_fields, model_of
from benchmarks.torch_llama import torch_llama
from moe_jax.checkpoints.leaves import named_leaves
from moe_jax.config.model import ComputeConfig, ModelConfig
from moe_jax.errors import UserError
from moe_jax.evaluation.packed_sequences import ScoredSequence
from moe_jax.evaluation.scorer import ROW_LENGTH, Scorer
from moe_jax.loaded.inference_model import Adapter
from moe_jax.models.causal_lm import LlamaForCausalLM

OPTIONS = 4
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3}
"""Largest difference of a score in nats, of about -60."""


def random_questions(model: ModelConfig, count: int) -> list[list[ScoredSequence]]:
    """Questions of 10 to 60 tokens with options of 1 to 12, as in ARC-Easy."""
    rng = np.random.default_rng(0)
    questions = []
    for _ in range(count):
        context = rng.integers(1, model.vocab_size, rng.integers(10, 61)).tolist()
        options = [
            rng.integers(1, model.vocab_size, rng.integers(1, 13)).tolist() for _ in range(OPTIONS)
        ]
        questions.append([ScoredSequence.continuation(context, option) for option in options])
    return questions


def score_with_transformers(
    model: Any, questions: Sequence[Sequence[ScoredSequence]], batch_size: int
) -> np.ndarray:
    """Scores [questions, OPTIONS] by a plain script."""
    flat = [(len(s.tokens), q, o) for q, group in enumerate(questions) for o, s in enumerate(group)]
    flat.sort(reverse=True)
    scores = np.zeros((len(questions), OPTIONS))
    for start in range(0, len(flat), batch_size):
        batch = flat[start : start + batch_size]
        longest = batch[0][0]
        sequences = [questions[q][o] for _, q, o in batch]
        tokens = torch.tensor([[*s.tokens, *[0] * (longest - len(s.tokens))] for s in sequences])
        mask = torch.tensor([[1] * n + [0] * (longest - n) for n, _, _ in batch])
        with torch.inference_mode():
            log_probs = model(tokens, attention_mask=mask).logits.float().log_softmax(-1)
        for row, (sequence, (size, q, o)) in enumerate(zip(sequences, batch, strict=True)):
            places = torch.arange(size - len(sequence.targets), size)
            scores[q, o] = log_probs[row, places, torch.tensor(sequence.targets)].sum()
    return scores


def score_with_scorer(
    scorer: Scorer, questions: Sequence[Sequence[ScoredSequence]], adapter: Adapter | None
) -> np.ndarray:
    """Scores [questions, OPTIONS] by `Scorer`."""
    scores = np.zeros((len(questions), OPTIONS))
    for batch in scorer.scores(questions, adapter, [False] * len(questions)):
        for question, option, score in batch:
            scores[question, option] = score.log_prob
    return scores


def timed(function: Callable[..., np.ndarray], *args: Any) -> tuple[float, np.ndarray]:
    """Seconds and result of `function(*args)`."""
    start = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - start, result


def measure(args: argparse.Namespace, model: ModelConfig) -> list[dict[str, Any]]:
    """Figures of the base and of each adapter."""
    generator = decoder(args, model)
    leaves = named_leaves(generator.params)
    arrays = {path.replace("/", "."): np.asarray(leaf) for path, leaf in leaves.items()}
    peer = torch_llama(hf_fields(model), arrays, args.dtype, "cpu").eval()
    questions = random_questions(model, args.questions)
    llama = LlamaForCausalLM(model, ComputeConfig(dtype=args.dtype), (), args.dtype)
    adapters = {
        kind: Adapter(*random_adapter(fields, model)) if fields else None
        for kind, fields in KINDS.items()
    }
    reference = score_with_transformers(peer, questions, args.batch_size)
    figures = []
    for name, adapter in adapters.items():
        scorer = Scorer(
            llama,
            generator.params,
            batch_size=args.rows,
            row_length=args.row_length,
        )
        first, scores = timed(score_with_scorer, scorer, questions, adapter)
        ours, theirs = [], []
        for _ in range(args.repeats):
            ours.append(timed(score_with_scorer, scorer, questions, adapter)[0])
            theirs.append(timed(score_with_transformers, peer, questions, args.batch_size)[0])
        if adapter is None and np.abs(scores - reference).max() > TOLERANCE[args.dtype]:
            raise UserError(f"scores differ by {np.abs(scores - reference).max():.2g} nats")
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        row = {
            "kind": name,
            "questions_per_second": args.questions / statistics.median(ours),
            "transformers_questions_per_second": args.questions / statistics.median(theirs),
            "speedup": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
            "seconds_to_compile": first - statistics.median(ours),
            "programs": scorer.compilations(),
        }
        figures.append(row)
        print(
            f"{name:8} {row['questions_per_second']:8.1f}  "
            f"{row['transformers_questions_per_second']:12.1f}  "
            f"{row['speedup']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f})  "
            f"{row['seconds_to_compile']:6.1f} s for {row['programs']} programs",
            flush=True,
        )
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--size", default="d512", help=SIZE_HELP)
    parser.add_argument("--vocab", type=int, help="number of tokens of the vocabulary (the size's)")
    parser.add_argument("--questions", type=int, default=64, help="number of questions (64)")
    parser.add_argument("--rows", type=int, default=16, help="rows of a batch of ours (16)")
    parser.add_argument(
        "--row-length", type=int, default=ROW_LENGTH, help=f"tokens of such a row ({ROW_LENGTH})"
    )
    parser.add_argument(
        "--batch-size", type=int, default=16, help="sequences of a batch of the script (16)"
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=5, help="number of timed pairs (5)")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args(argv)
    args.prompt, args.new_tokens = 64, 16
    try:
        check_output(args.output)
        model = model_of(args.size, args.vocab)
        facts = machine()
        print(f"{args.size} model in {args.dtype}; {one_line(facts)}")
        print("kind      questions/s  transformers  ratio                compilation")
        figures = measure(args, model)
        write_json(args.output, args, benchmark="scoring", machine=facts, figures=figures)
    except UserError as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
