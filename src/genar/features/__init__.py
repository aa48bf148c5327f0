"""The feature store: every spot of a section embedded once, found again by its recipe, resumed where it stopped."""

from genar.features.imports import (
    find_feature_file,
    import_features,
    import_recipe,
    imported_sha256,
    read_foreign_features,
)
from genar.features.recipe import FeatureRecipe, Inputs, default_store, recipe_and_inputs, recipe_of, store_path
from genar.features.sections import default_workers, embed_sections, embed_widths, import_sections
from genar.features.store import BATCH_SIZE, Busy, check_source, embed
from genar.features.stored import StoredInputs, read_features, read_inputs

__all__ = [
    "BATCH_SIZE",
    "Busy",
    "FeatureRecipe",
    "Inputs",
    "StoredInputs",
    "check_source",
    "default_store",
    "default_workers",
    "embed",
    "embed_sections",
    "embed_widths",
    "find_feature_file",
    "import_features",
    "import_recipe",
    "import_sections",
    "imported_sha256",
    "read_features",
    "read_foreign_features",
    "read_inputs",
    "recipe_and_inputs",
    "recipe_of",
    "store_path",
]
