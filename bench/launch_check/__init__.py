"""Every op of the `triton` backend called once through Triton's own launch path, without a GPU.

driver      a stand-in for the CUDA driver: kernels compile for sm_90, launches go nowhere
pairwise    tables of cases in which every pair of option values occurs
inputs      tensors for the cases
extraction, gathering, losses   the cases, by op
check       the command: run the cases, name what fails, exit status
"""
