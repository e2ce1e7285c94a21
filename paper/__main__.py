"""Every figure and table of the paper, in miniature: train, measure, and write RESULTS.md.

python -m paper                     # three seeds, as committed in paper/RESULTS.md
python -m paper --seeds 1 --results out/paper
"""

from pathlib import Path

from data.files import write_text
from data.tiny_world import World
from paper import appendix_b, fig2, fig3, fig4, norm, table1, table2, table4
from paper.measure import TIMES
from paper.networks import Kept, networks_of, with_needs
from paper.report import (
    OURS,
    STAND_INS,
    Results,
    draw,
    machine,
    parse_arguments,
    results_of,
    section_text,
    table,
    today,
    verdict,
)
from run.cli import run_cli

SCRIPTS = [fig2, fig3, norm, table1, table2, fig4, table4]  # in the paper's order

METRICS = {  # what each is, and how its stand-in differs
    "exact": (
        "the whole answer right, in the form asked for, and ended",
        "answers are short, and checked rather than judged",
    ),
    "ins": ("the form asked for, six kinds, whatever the answer says", ""),
    "arith": (
        "`exact` on sums that no demonstration shows",
        "one step of addition, whose answers bases have read, or two, whose answers they have not",
    ),
    "new exact": (
        "`exact` on people whose facts only continual pretraining tells",
        "other bases know some code, but nothing of these people",
    ),
    "2-shot": (
        "two answered questions, then a choice of all 12 to 16 values, by log-likelihood, without a chat",
        "one metric for four columns",
    ),
    "mc": (
        "a choice of 8 values by log-likelihood, in the chat",
        "zero-shot choices too, but between plain facts",
    ),
    "know": ("the right value somewhere in the answer", ""),
    "fk": ("the right value is the likeliest continuation, without choices", ""),
}


def overview(results: Results) -> str:
    """All verdicts at a glance."""
    rows, counts = [], {}
    for script in SCRIPTS:
        for claim in script.CLAIMS:
            if claim.section != OURS:
                ours = verdict(claim.gap(results))
                counts[ours] = counts.get(ours, 0) + 1
                rows.append([script.TITLE.partition(":")[0], claim.section, claim.says, ours])
    plural = {
        "holds": "hold",
        "undecided": "are undecided",
        "does not hold": "do not hold",
        "no verdict on one seed": "have no verdict",
    }
    tally = ", ".join(
        f"{counts[name]} {several}" for name, several in plural.items() if name in counts
    )
    return (
        f"{table(['', '', 'the paper concludes', 'here'], rows)}\n\nOf {len(rows)} claims {tally}."
    )


def document(results: Results, seeds: int) -> str:
    made = with_needs(
        network
        for script in SCRIPTS
        for system in script.SYSTEMS
        for network in networks_of(system)
    )
    costs = [
        Kept(seed).ledger[network]["core_seconds"] for seed in range(seeds) for network in made
    ]
    stands_for = {
        metric: ", ".join(column for column, ours in STAND_INS.items() if ours == metric)
        for metric in METRICS
    }
    metrics = [
        [stands_for[name] or "-", f"`{name}`", what, but] for name, (what, but) in METRICS.items()
    ]
    metrics.append(["ToxiGen", "no stand-in", "nothing toxic can be said in this world", ""])
    facts, sums = len(World(0).fact_items("evaluation")), len(World(0).sum_items("evaluation"))
    sections = "\n".join(section_text(script, results, seeds) for script in SCRIPTS)
    return f"""# The paper in miniature

`python -m paper --seeds {seeds}`

Made on {today()}, on {machine()}. {len(costs)} networks were trained,
one thread each, in {sum(costs) / 60:.0f} core-minutes. Seeds: {", ".join(map(str, range(seeds)))}; a seed changes
the whole world: names, facts, tokenizer, first weights and the order of the data. Numbers are percentages: mean and
standard deviation over the seeds, on evaluation people, by whom nothing was chosen. On each seed a system answers {facts} questions
about facts and {sums} about sums, each in {TIMES} forms (through a vocabulary map in one), so that a single seed's `exact`, `know` and `ins` have a
sampling error of at most about 2 points and `arith` one of 4 (through a map 3 and 5). `mc`, `fk` and `2-shot` ask once: 3; `new exact` and
`new 2-shot` ask 80 questions once: 6.

tiny-s stands for TinyLlama-1.1B, tiny-m for Llama-2-7B, tiny-l for Llama-2-13B or 70B, tiny-m pretrained further for
CodeLlama-7B, and tiny-b-l and tiny-c-l, with tokenizers of their own, for Llama-3-8B. Bases of all sizes and tokenizers
have read the same text. What stands for the paper's columns:

{table(["the paper's column", "here", "what it is", "how it differs"], metrics)}

The rule for verdicts is the same for all claims, and goes by the mean of a claim's gap over the seeds and two standard errors on
both sides of it: a claim *holds* if all of this interval is above zero, it *does not hold* if all of it is below, and is *undecided* if zero
lies within. With three seeds such an interval covers 82%: of 40 claims with nothing behind them, three or four would hold by luck.
Each claim is printed with its gap on each seed, in points.

{overview(results)}

Table 3 is about time, not about answers: `python -m paper.table3`, and [bench/RESULTS.md](../bench/RESULTS.md).

{sections}
{appendix_b.section(seeds)}"""


def main():
    args = parse_arguments(__doc__.split("\n\n")[0], Path(__file__).parent)
    results = results_of(SCRIPTS, args.seeds, args.processes)
    args.results.mkdir(parents=True, exist_ok=True)
    for script in SCRIPTS:
        draw(script, results, args.results)
    write_text(args.results / "RESULTS.md", document(results, args.seeds))
    print(overview(results))
    print(f"saved {args.results / 'RESULTS.md'}")


if __name__ == "__main__":
    run_cli(main)
