"""``vm-io``: single requests to an image, typed or scripted; the same commands and output as qemu-io."""
