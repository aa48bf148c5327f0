"""Sections as they lie on real disks: merged, linked, named from within their folder, beside others."""

import pytest

from genar.encoders import load_encoder
from genar.errors import InputError


def test_imported_features_have_one_precision():
    with pytest.raises(InputError, match="computes in fp32, not in bf16; leave it out"):
        load_encoder("import:mine", precision="bf16")
