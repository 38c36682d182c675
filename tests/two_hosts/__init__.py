"""Two hosts that train one LoRA, and the cable between them is pulled.

    python -m tests.two_hosts

The hosts are network name spaces of this machine, joined by a pair of virtual cards; each has its
own name and its own working folder, and torchrun finds the other by its name. The run is cut off in
the middle, both ends must stop by themselves and say why, and the same command on both must end
with the weights, bit for bit, of a run that was left alone. Needs Linux, root and `ip` (iproute2).
"""
