"""Gated attention from plain fused attention: for all rows, for rows behind a cut, and with a window split over ranks."""
