"""VMware disk images: VMDK in all its subformats, and OVA appliances."""
