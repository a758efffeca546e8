import logging

# PEFT imports it, and it would tell of kernels that it does not find.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
