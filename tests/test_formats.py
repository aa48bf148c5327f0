""""""

import shutil

from genar.data import read_sections
from genar.genes import select_panel


def test_a_panel_is_selected_without_images(tissue, tmp_path):
    folder = shutil.copytree(tissue, tmp_path / "hest", ignore=shutil.ignore_patterns("wsis"))
    assert len(select_panel(read_sections(folder), n_genes=20).genes) == 20
