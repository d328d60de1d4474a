"""Tests of scripts/report.py: what it draws of a report, and that its page stands alone.

Run by ctest; exits with 77 (skipped) where matplotlib is not installed (requirements-plots.txt).
"""

import importlib.util
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest

if importlib.util.find_spec("matplotlib") is None:
    print("skipped: matplotlib is not installed (requirements-plots.txt)")
    sys.exit(77)

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "scripts" / "report.py"
ROLES = ["query", "key", "value", "attention out", "up", "down"]


def level(number, form, cost, quality, rank, **more):
    count = 2 * len(ROLES)
    is_full = form == "full"
    return {
        "level": number,
        "form": form,
        "relative_cost": cost,
        "relative_flops": 1.0,
        "weight_bytes": int(1e6 * cost),
        "flops": 1000,
        "quality": quality,
        "spearman": quality,
        "forms": ["dense" if is_full else form] * count,
        "ranks": [0 if is_full else rank] * count,
        **more,
    }


def small_report():
    names = [(f"layer.{block}.{role}", role, block) for block in range(2) for role in ROLES]
    return {
        "title": "<tiny> & small",
        "architecture": "BertModel",
        "dtype": "int8",
        "tokens": 100,
        "pairs": 10,
        "quality_text": {"quality": "Spearman", "quality_vs_source": "Spearman to the source"},
        "levels": [
            level(0, "residual", 0.55, 0.4, 0, seconds_per_token=0.001),
            level(1, "residual", 0.6, 0.9, 8, interpolated=True, estimated_quality=0.89),
            level(2, "residual", 0.7, 0.95, 16, seconds_per_token=0.002),
            level(3, "full", 1.0, 1.0, 0, seconds_per_token=0.002),
        ],
        "marks": [
            {"name": "bf16", "weight_bytes": 2000000, "relative_cost": 1.9, "relative_flops": 1.0},
            {
                "name": "int8",
                "weight_bytes": 1000000,
                "relative_cost": 1.0,
                "relative_flops": 1.0,
                "quality": 1.0,
            },
        ],
        "layers": [{"name": n, "role": r, "block": b, "out": 8, "in": 8} for n, r, b in names],
        "resident_bytes": {"coarse planes": 500000, "fine planes": 500000, "prefix factors": 0},
        "spectra": [
            {"name": n, "residual": {"ranks": [0, 8, 16], "left": [0.01, 0.004, 0.0]}}
            for n, _, _ in names
        ],
    }


class ReportTest(unittest.TestCase):
    def draw(self, report):
        """The files beside the report, by name."""
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "report.json"
            path.write_text(json.dumps(report), encoding="utf-8")
            process = subprocess.run(
                [sys.executable, SCRIPT, path],
                capture_output=True,
                text=True,
                timeout=240,
                check=False,
            )
            self.assertEqual(process.returncode, 0, process.stderr)
            self.assertEqual(process.stderr, "")
            return {p.name: p.read_bytes() for p in path.parent.iterdir() if p != path}

    def test_everything_that_is_known_is_drawn_on_a_page_of_its_own(self):
        files = self.draw(small_report())
        pictures = {
            "quality_bytes",
            "quality_flops",
            "quality_time",
            "ranks",
            "spectra",
            "resident",
        }
        self.assertEqual(set(files), {f"{name}.png" for name in pictures} | {"report.html"})
        for name in pictures:
            self.assertTrue(files[f"{name}.png"].startswith(b"\x89PNG"), name)
        page = files["report.html"].decode()
        self.assertIn("<title>&lt;tiny&gt; &amp; small</title>", page)
        self.assertEqual(page.count("data:image/png;base64,"), len(pictures))
        self.assertEqual(re.findall(r'(?:src|href)="(?!data:)', page), [])
        self.assertNotIn("http", page)
        self.assertEqual(page.count('<tr class="between">'), 1)
        self.assertIn("<td>0.8900</td>", page)

    def test_a_checkpoint_has_its_full_level_only(self):
        report = small_report()
        report["levels"] = [level(0, "full", 1.0, 1.0, 0)]
        report["marks"] = []
        del report["spectra"]
        files = self.draw(report)
        self.assertEqual(
            set(files), {"quality_bytes.png", "quality_flops.png", "resident.png", "report.html"}
        )


if __name__ == "__main__":
    unittest.main()
