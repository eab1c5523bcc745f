"""Encryption of disk images: secrets, sector ciphers, the LUKS header, and the node that puts them over storage.

The ciphers come from the package ``cryptography`` (``pip install 'vm-core[crypto]'``), imported when first needed.
"""
