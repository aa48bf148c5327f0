"""Recipes: one YAML file per table, run by ``genar bench``; gene lists of the paper beside them."""
