"""Real kernels with one line changed, interpreted: what parity by one evaluation of the reference
finds, it finds by several. The package is copied, so that nothing of the kernels is changed here.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PACKAGE = Path(__file__).parents[2] / "elmkernels"
RUN = """
import json, sys
from functools import partial
import torch
from elmkernels import ops
from elmkernels.testing import CASES
from elmkernels.testing.parity import EVALUATIONS, Expected

op, names = sys.argv[1], sys.argv[2].split(",")
kernel, found = partial(getattr(ops, op), backend="triton"), []
for case in CASES[op]:
    for dtype in {torch.float32, torch.float16} & set(case.dtypes):
        if case.name in names:
            expected = Expected(op, case, dtype)
            got = expected.results(kernel)
            shares = [max(c.used for c in expected.judge(got, range(n))) for n in (1, EVALUATIONS)]
            found.append([case.name, *shares])
print(json.dumps(found))
"""
ILL = "one_key_outweighs,varlen_one_key_outweighs"
# (what is wrong, file, its line's old and new text, op, cases)
MUTATIONS = [
    ("no eps", "rms_norm", "squares / n + eps", "squares / n", "rms_norm", "tiny,eps_0.01"),
    ("gradient without the mean's", "rms_norm", "(head_dy * w - z * mean)", "(head_dy * w)",
     "rms_norm", "width_64,outliers"),
    ("no eps", "qk_norm_rope", "/ (2 * HALF) + eps", "/ (2 * HALF)", "qk_norm_rope", "tiny"),
    ("gradient turned the other way", "qk_norm_rope", "dy_b * cos - dy_a * sin",
     "dy_b * cos + dy_a * sin", "qk_norm_rope", "head_dim_20,outliers"),
    ("exp of 12 bits", "swiglu", "tl.exp(-gate)", "tl.exp(-gate) * 1.0002", "swiglu", "width_33"),
    ("a gradient's term", "swiglu", "gate * (1.0 - s)", "gate * s", "swiglu", "width_33,huge"),
    ("sees the next key", "attention", "limit = first + 1 +", "limit = first + 2 +", "attention",
     f"{ILL},chunk"),
    ("a short constant", "attention", "scale * math.log2(math.e)", "scale * 1.4427", "attention",
     f"{ILL},scores_of_hundreds"),
    ("a level of 16 bits", "attention", "tl.store(lse + base + at, level,",
     "tl.store(lse + base + at, level.to(tl.float16).to(tl.float32),", "attention", ILL),
    ("gradient without the softmax's mean", "_attention_bwd", "ds = p * (dp - delta[:, None])",
     "ds = p * dp", "attention", ILL),
    ("gradient without the last key", "_attention_bwd", "index[:, None] <= (first",
     "index[:, None] < (first", "attention", f"{ILL},chunk"),
    ("narrow weights", "_attention_bwd", "tl.dot(p.to(slopes.dtype)",
     "tl.dot(p.to(tl.float16).to(slopes.dtype)", "attention", ILL),
    ("smoothing of one half", "linear_cross_entropy", "hit = 1.0 - smoothing", "hit = 1.0",
     "linear_cross_entropy", "none_every_option,huge_negative_offset"),
    ("half the z-loss's gradient", "linear_cross_entropy", "1.0 + 2.0 * z_loss * lse",
     "1.0 + z_loss * lse", "linear_cross_entropy", "none_every_option,huge_negative_offset"),
    ("sum not faded", "linear_cross_entropy", "total * tl.exp(top - larger)", "total",
     "linear_cross_entropy", "vocabulary_4099,logits_of_ten_thousand"),
    ("narrow products", "linear", "tl.sum(w * v, 2)", "tl.sum((w * v).to(tl.float16), 2)",
     "linear", "plain_rows_3,plain_outliers,affine4_64_rows_3"),
]  # fmt: skip


def copied(folder: Path) -> Path:
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "build_report.json")
    return Path(shutil.copytree(PACKAGE, folder / "elmkernels", ignore=ignored))


def held(folder: Path, op: str, cases: str) -> list[tuple[str, float, float]]:
    """(case, share of what is allowed by one evaluation, by several) of the copied kernels."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, op, cases],
        env=environment, cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {case for case, *_ in found} == set(cases.split(","))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "old", "new", "op", "cases"),
    [pytest.param(*rest, id=f"{rest[0]}-{name}") for name, *rest in MUTATIONS],
)
def test_a_changed_line_is_found(tmp_path, file, old, new, op, cases):
    path = copied(tmp_path) / "triton" / f"{file}.py"
    source = path.read_text()
    assert old in source
    path.write_text(source.replace(old, new))
    shares = held(tmp_path, op, cases)
    assert any(several > 1 for _, _, several in shares)
    assert all(several > 1 for _, once, several in shares if once > 1.1), shares
