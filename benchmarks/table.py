"""Markdown tables from benchmarks/results: `python -m benchmarks.table` rewrites them in README.md and docs.

A table stands between `<!-- benchmarks:NAME -->` and `<!-- end -->` and comes from results/NAME.json. The place named
`gpus` holds one section for every results file of a GPU, with the rows of D = 1024 and mean chunk 6 (`gpus-all`: with
every row); it stays empty as long as there is no such file. `chunk_lm` is ChunkLM's training step, `training_*` are
those of `python -m benchmarks.training`, `learning` is that of `python -m benchmarks.learning`, `decisive` that of
`python -m benchmarks.learning.decisive`, `agglutinative` that of `python -m benchmarks.agglutinative`,
`finetuning` that of `python -m benchmarks.finetuning`, `layer_ops`,
`scaling`, `decoding` and `laptop_step` are rows of cpu.json, `peers` is that of test_peers.py, `predicted` that of
`python -m benchmarks.predict`, and `faulty_runs` that of `python -m benchmarks.faulty_runs`. `tables/` makes most of
them.
`python -m benchmarks.table NAME` prints one table in full (`card`: that of the GPU here).
"""

from __future__ import annotations

import re
import sys

from .agglutinative.report import section as agglutinative_section
from .learning.report import learning_section
from .tables import files
from .tables.decoding import decoding_section
from .tables.experiments import chunk_lm_section, curriculum_section, decisive_section, rate_section
from .tables.faulty_runs import faulty_runs_section
from .tables.finetuning import finetuning_section
from .tables.gpu import gpu_section, gpu_sections
from .tables.laptop import laptop_step_section
from .tables.ops import cpu_section, layer_ops_section, layers_section, scaling_section
from .tables.peers import peers_section
from .tables.predicted import predicted_section

MARK = re.compile(r"(<!-- benchmarks:([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
# the results file and the function of every place that does not stand for a whole file
SECTIONS = {
    "chunk_lm": ("chunk_lm", chunk_lm_section),
    "training_rate": ("training_rate", rate_section),
    "training_curriculum": ("training_curriculum", curriculum_section),
    "layers": ("layers", layers_section),
    "learning": ("learning", learning_section),
    "decisive": ("decisive", decisive_section),
    "agglutinative": ("agglutinative", agglutinative_section),
    "finetuning": ("finetuning", finetuning_section),
    "layer_ops": ("cpu", layer_ops_section),
    "scaling": ("cpu", scaling_section),
    "decoding": ("decoding", decoding_section),
    "laptop_step": ("cpu", laptop_step_section),
    "peers": ("peers", peers_section),
    "predicted": ("predicted", predicted_section),
    "faulty_runs": ("faulty_runs", faulty_runs_section),
}


def render(name: str) -> str:
    if name in ("gpus", "gpus-all"):
        return gpu_sections(full=name == "gpus-all")
    if name in SECTIONS:
        file, section = SECTIONS[name]
        return section(files.load(file)) if (files.RESULTS / f"{file}.json").is_file() else ""
    data = files.load(name)
    return gpu_section(data, full=True) if "gpu" in data["machine"] else cpu_section(data)


def update(text: str) -> str:
    return MARK.sub(lambda m: m[1] + render(m[2]) + m[3], text)


def main(names: list[str]) -> int:
    for name in names:
        if name == "card":
            import torch

            from .harness import slug

            name = slug(torch.cuda.get_device_name())
        print(render(name))
    if names:
        return 0
    for path in [files.ROOT / "README.md", *sorted((files.ROOT / "docs").glob("*.md"))]:
        text = path.read_text()
        if (new := update(text)) != text:
            path.write_text(new)
            print(f"updated {path.relative_to(files.ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
