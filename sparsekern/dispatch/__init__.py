"""From a public function to the kernel that serves it, in the order in which a call meets them:

fast_path    whether torch's dispatcher has anything to do (gradients, autocast, transforms, ...)
operations   what torch knows of an operation, and the choice of an implementation for a call
autograd     how a gradient that is written in Python is recorded
backends     the order of choice, and how to force one
modules      the compiled modules, and whether Triton runs here
launch       how a compiled kernel is called: outputs, pointers, device
kept_memory  memory of large outputs on a CPU, kept for the next of their size
information  what `sparsekern info` tells of all this
"""
