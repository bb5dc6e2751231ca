"""Any network, any method: dense tensors and masks, K trials at once.

A GPU wants all slots in one operation (`lifted`), a CPU wants them one after another (`turns`);
the step is the same text (`step`).
"""
