"""Every figure and table of the paper, in miniature: train, measure, and write RESULTS.md.

python -m paper                     # three seeds, as committed in paper/RESULTS.md
python -m paper --seeds 1 --results out/paper
"""

from collections import Counter
from pathlib import Path

from data.files import write_text
from data.tiny_world import World
from paper import appendix_b, fig2, fig3, fig4, norm, table1, table2, table4
from paper.measure import TIMES
from paper.networks import FOREIGN, Kept, networks_of, with_needs
from paper.report import (
    OURS,
    STAND_INS,
    Results,
    draw,
    made_on,
    parse_arguments,
    results_of,
    section_text,
    table,
    verdict,
)
from run.cli import run_cli

SCRIPTS = [fig2, fig3, norm, table1, table2, fig4, table4]  # in the paper's order

METRICS = {  # what each is
    "exact": "the whole answer is right, in the form asked for, and ended: checked, not judged",
    "ins": "the form is the one asked for, of six kinds",
    "arith": "`exact` on sums that no demonstration shows",
    "new exact": "`exact` on new people, of whom only the text of the further pretraining tells",
    "2-shot": "two answered questions, then the likeliest of all 12 to 16 values, without a chat",
    "mc": "the likeliest of 8 values, in the chat",
    "fk": "the right value is the likeliest continuation, without choices",
}


def overview(results: Results) -> str:
    """How many verdicts of each kind there are, and where those are that do not hold."""
    counts, places = Counter(), {}
    for script in SCRIPTS:
        for claim in script.CLAIMS:
            if claim.section == OURS:
                continue
            ours = verdict(claim.gap(results))
            counts[ours] += 1
            places.setdefault(ours, Counter())[script.TITLE.partition(":")[0]] += 1
    tally = ", ".join(f'"{ours}" {count}' for ours, count in counts.most_common())
    lines = [f"Of {counts.total()} claims of the paper: {tally}."]
    for ours, found in places.items():
        if ours != "holds":
            named = ", ".join(f"{count} of {place}" for place, count in found.items())
            lines.append(f"{ours.capitalize()}: {named}.")
    return "\n".join(lines)


def document(results: Results, seeds: int) -> str:
    systems = [system for script in SCRIPTS for system in script.SYSTEMS]
    made = with_needs(network for system in systems for network in networks_of(system))
    ledgers = [Kept(seed).ledger for seed in range(seeds)]
    costs = [ledger[network]["core_seconds"] for ledger in ledgers for network in made]
    metrics = [["metric (the paper's columns)", "what it asks for"]]
    for name, what in METRICS.items():
        columns = [column for column, ours in STAND_INS.items() if ours == name]
        metrics.append([f"`{name}`" + (f" ({', '.join(columns)})" if columns else ""), what])
    facts, sums = len(World(0).fact_items("evaluation")), len(World(0).sum_items("evaluation"))
    sections = "\n".join(section_text(script, results, seeds) for script in SCRIPTS)
    return f"""# The paper in miniature

`python -m paper --seeds {seeds}`

{made_on()}
{len(costs)} networks were trained, one thread each, in {sum(costs) / 60:.0f} core-minutes.

Numbers are percentages: mean and standard deviation over seeds {", ".join(map(str, range(seeds)))}. A seed changes the whole world: names, facts,
tokenizer, first weights and the order of the data. Questions are about evaluation people, never used to choose anything:
{facts} about facts and {sums} sums, each in {TIMES} forms (through a vocabulary map in one). A single seed's sampling error is at
most about 2 points for `exact` and `ins`, and 3 to 6 for the others and through a map.

tiny-s stands for TinyLlama-1.1B, tiny-m for Llama-2-7B, tiny-l for Llama-2-13B (in Table 2 for 70B), and tiny-m pretrained
further for CodeLlama-7B. {" and ".join(FOREIGN)} have tokenizers of their own and stand for Llama-3-8B. Bigger bases have read
more text. Our metrics, with the columns of the paper that they stand for (none stands for ToxiGen):

{table(metrics)}

One rule gives all verdicts. Each claim has a gap that is above zero where the claim is true. It is printed in points: the
mean over the seeds, then the gap on each seed in brackets. The rule takes two standard errors on both sides of the mean. A
claim *holds* if all of this interval is above zero, *does not hold* if all of it is below, and is *undecided* if zero lies
in it. With three seeds the interval covers 82%: of 40 claims with nothing behind them, three or four would hold by luck.

{overview(results)}

Table 3 is about time, not about answers: `python -m paper.table3` and [bench/RESULTS.md](../bench/RESULTS.md).

{sections}
{appendix_b.section(seeds)}"""


def main():
    args = parse_arguments(__doc__.split("\n\n")[0], Path(__file__).parent)
    results = results_of(SCRIPTS, args.seeds, args.processes)
    for script in SCRIPTS:
        draw(script, results, args.results)
    write_text(args.results / "RESULTS.md", document(results, args.seeds))
    print(overview(results))
    print(f"saved {args.results / 'RESULTS.md'}")


if __name__ == "__main__":
    run_cli(main)
