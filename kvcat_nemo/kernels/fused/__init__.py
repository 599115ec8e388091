"""Fused attention kernels of other packages behind one interface, and the choice among them."""
