"""The configs that come with the package: `common` lists every field, the others build on it."""
