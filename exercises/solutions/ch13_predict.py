"""Chapter 13: predict before you measure."""


def predict(select, attention, dense):
    """Selection and dense attention see all pairs; a query reads k blocks at every length."""
    return 16 * select, 4 * attention, 16 * dense
