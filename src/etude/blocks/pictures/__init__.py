"""Pictures: one palette, plots, panels and films."""
