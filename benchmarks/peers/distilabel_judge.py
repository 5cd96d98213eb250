"""distilabel 1.5.3: `PrometheusEval` (relative) in a pipeline, fed with the same rows and rules.
Variants: a number is the size of a batch, all of which is in flight at once; left out: as many as
the other clients have in flight."""

from __future__ import annotations

import time

import workload
from distilabel.models.llms import OpenAILLM
from distilabel.pipeline import Pipeline
from distilabel.steps import LoadDataFromDicts
from distilabel.steps.tasks import PrometheusEval

RUBRIC = (
    "["
    + workload.SYSTEM.replace("\n", " ")
    + "]\n"
    + "\n".join(f"Score {i}: level {i}" for i in range(1, 6))
)


def main() -> None:
    options = workload.arguments()
    size = int(options.variant or options.concurrency)
    llm = OpenAILLM(
        model="mock-prometheus",
        base_url=options.base_url,
        api_key="x",
        generation_kwargs={"max_new_tokens": 64, "temperature": 0.0},
    )
    with Pipeline(name="peers") as pipeline:
        load = LoadDataFromDicts(data=list(workload.rows(options.n)), batch_size=size)
        load >> PrometheusEval(
            name="judge",
            mode="relative",
            rubric="constitution",
            rubrics={"constitution": RUBRIC},
            llm=llm,
            input_batch_size=size,
            add_raw_input=False,
            add_raw_output=False,
        )
    started = time.perf_counter()
    found = pipeline.run(use_cache=False)["default"]["train"]["result"]
    workload.report(options.n, started, sum(x is not None for x in found))


if __name__ == "__main__":
    main()
