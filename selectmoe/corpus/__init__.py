"""A corpus in an order that does not depend on how it was split into files."""
