"""The way from a public function to the kernel that serves it, in the order of a call.

fast_path    the test whether torch's dispatcher has anything to do (gradients, autocast, ...)
operations   registration with torch, and the choice of an implementation for a call
autograd     recording of gradients that are written in Python
transforms   the tensors of torch.func and of tracing
backends     the order of choice, and a way to force one
modules      the compiled modules, and the test whether Triton runs here
launch       calls of compiled kernels: outputs, pointers, device
kept_memory  memory of large outputs on a CPU, kept for the next of their size
information  what `sparsekern info` prints of all this
"""
