"""Does a debate bring a judge nearer to the truth? Questions with a right and a wrong answer.

    python benchmarks/judge_debate.py MODEL [--rounds 0 1]

For each number of rounds: how often the judge prefers the right answer, its two orders agree, and
the share of verdicts for the place that stands first. MODEL is a folder or a hub name; what
`make real` has downloaded will do. Files lie below runs/judge_debate/.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "runs/judge_debate"
PRINCIPLE = {"name": "true", "principle": "The better answer is the one that is true."}
# (question, right, wrong): facts that a small model may know, both answers of like length.
QUESTIONS = """
What is the capital of France?|The capital of France is Paris.|The capital of France is Rome.
What is the capital of Japan?|The capital of Japan is Tokyo.|The capital of Japan is Seoul.
What is the capital of Italy?|It is Rome.|It is Madrid.
How many days does a week have?|A week has seven days.|A week has nine days.
How many months does a year have?|A year has twelve months.|A year has ten months.
How many legs does a spider have?|A spider has eight legs.|A spider has four legs.
How many legs does a dog have?|A dog has four legs.|A dog has six legs.
What colour is the sky on a clear day?|The sky is blue.|The sky is green.
What colour is fresh grass?|Fresh grass is green.|Fresh grass is purple.
What colour is snow?|Snow is white.|Snow is black.
What do cows eat?|Cows eat grass.|Cows eat stones.
What do bees make?|Bees make honey.|Bees make milk.
What does a hen lay?|A hen lays eggs.|A hen lays bricks.
Which is larger, the sun or the moon?|The sun is larger.|The moon is larger.
Which is faster, a car or a snail?|A car is faster.|A snail is faster.
Which is heavier, an elephant or a mouse?|An elephant is heavier.|A mouse is heavier.
Which is colder, ice or steam?|Ice is colder.|Steam is colder.
What is 2 plus 2?|2 plus 2 is 4.|2 plus 2 is 7.
What is 5 plus 5?|5 plus 5 is 10.|5 plus 5 is 13.
What is 10 minus 3?|10 minus 3 is 7.|10 minus 3 is 2.
What is 3 times 3?|3 times 3 is 9.|3 times 3 is 12.
Who wrote Hamlet?|William Shakespeare wrote Hamlet.|Isaac Newton wrote Hamlet.
Who painted the Mona Lisa?|Leonardo da Vinci painted it.|Napoleon painted it.
On which continent is Egypt?|Egypt is in Africa.|Egypt is in South America.
On which continent is China?|China is in Asia.|China is in Africa.
At how many degrees Celsius does water boil?|Water boils at 100 degrees.|Water boils at 20 degrees.
At how many degrees Celsius does water freeze?|Water freezes at 0 degrees.|It freezes at 50 degrees.
What gas do people need to breathe?|People need oxygen.|People need helium.
What do fish live in?|Fish live in water.|Fish live in trees.
In which season does it snow?|It snows in winter.|It snows in summer.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, nargs="+", default=[0, 1])
    args = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    rows = [line.split("|") for line in QUESTIONS.strip().splitlines()]
    pairs, constitution = FOLDER / "pairs.jsonl", FOLDER / "constitution.yaml"
    keys = ("prompt", "chosen", "rejected")
    lines = (json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows)
    pairs.write_text("".join(lines), encoding="utf-8")
    constitution.write_text(json.dumps({"principles": [PRINCIPLE]}), encoding="utf-8")  # is YAML
    for rounds in args.rounds:
        started = time.monotonic()
        words = ["--input", pairs, "--judge", args.model, "--constitution", constitution]
        words += ["--debate", rounds, "--output", FOLDER / f"{rounds}.jsonl", "--force"]
        words += ["--judge-max-tokens", 64] if rounds else []
        line = [sys.executable, str(ROOT / "judge.py"), *map(str, words)]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
        said = done.stdout.partition("wrote")[0] or done.stderr
        print(f"{rounds} rounds, {time.monotonic() - started:.0f} s\n{said}", flush=True)


if __name__ == "__main__":
    main()
