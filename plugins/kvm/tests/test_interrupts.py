"""Interrupts through the kernel's chips: ISA lines, the PIT, MSIs, irqfd, start-up IPIs, resets."""

from __future__ import annotations

import os
import struct
import time

from kvm_guest import DONE, ORIGIN, Guest, guest, needs_kvm, until

pytestmark = needs_kvm

FINISH = bytes((0xB0, 0x01, 0xE6, DONE))  # mov al, 1; out DONE, al
#: An MSI for local APIC 0: fixed delivery, physical destination (Intel SDM vol. 3, 12.11).
MSI_ADDRESS = 0xFEE00000
COUNTER = 0x3000
READY = 0x3010


def pic_setup(mask: int) -> bytes:
    """Real-mode code that sets the PICs up at vectors 0x20 and 0x28, with *mask* for the first one."""
    writes = ((0x20, 0x11), (0xA0, 0x11), (0x21, 0x20), (0xA1, 0x28), (0x21, 4), (0xA1, 2), (0x21, 1), (0xA1, 1))
    return b"".join(bytes((0xB0, value, 0xE6, port)) for port, value in (*writes, (0x21, mask), (0xA1, 0xFF)))


def set_vector(g: Guest, vector: int, address: int) -> None:
    g.memory.write(4 * vector, struct.pack("<HH", address, 0))


#: inc dword [COUNTER]; mov al, 0x20; out 0x20, al (EOI); iret
COUNT_IRQ = b"\x66\xff\x06" + struct.pack("<H", COUNTER) + b"\xb0\x20\xe6\x20\xcf"


def test_a_line_wakes_a_halted_processor() -> None:
    """A guest in HLT takes the interrupt of an ISA line through the kernel's PIC, and goes on behind the HLT."""
    code = pic_setup(0xF7) + b"\xc6\x06\x10\x30\x01\xfb\xf4" + FINISH  # mov byte [READY], 1; sti; hlt
    with guest(code) as g:
        g.memory.write(0x2000, COUNT_IRQ)
        set_vector(g, 0x23, 0x2000)
        with g.running():
            until(lambda: g.memory.read(READY, 1) == b"\x01")
            time.sleep(0.02)
            assert g.memory.read(COUNTER, 4) == bytes(4)
            assert not g.done.log
            with g.lock:
                g.accel.irqchip.set_irq(3, True)
            until(lambda: g.done.log)
            with g.lock:
                g.accel.irqchip.set_irq(3, False)
        assert g.memory.read(COUNTER, 4) == b"\x01\0\0\0"


def test_the_kernels_timer_ticks() -> None:
    """Counter 0 of the kernel's PIT, programmed for 1 kHz, brings some 100 interrupts in a tenth of a second."""
    code = (
        pic_setup(0xFE)
        + b"\xb0\x34\xe6\x43\xb0\xa9\xe6\x40\xb0\x04\xe6\x40"  # counter 0, mode 2, divisor 1193
        + b"\xfb\xf4\x66\x83\x3e\x00\x30\x64\x72\xf7"  # sti; 1: hlt; cmp dword [COUNTER], 100; jb 1
        + FINISH
    )
    with guest(code) as g:
        g.memory.write(0x2000, COUNT_IRQ)
        set_vector(g, 0x20, 0x2000)
        start = time.monotonic()
        g.run()
        elapsed = time.monotonic() - start
        assert g.memory.read(COUNTER, 4) == b"\x64\0\0\0"
        assert 0.08 < elapsed < 1.0


#: Flat 32-bit: SVR (0xFEE000F0) = 0x1FF: local APIC on; mov byte [READY], 1; sti; 1: hlt; jmp 1
APIC_ON = b"\xc7\x05\xf0\x00\xe0\xfe\xff\x01\x00\x00" + b"\xc6\x05" + struct.pack("<I", READY) + b"\x01"
WAIT = b"\xfb\xf4\xeb\xfd"


def count_vector(g: Guest, vector: int, counter: int) -> None:
    """A 32-bit handler that increments the dword at *counter*."""
    code = b"\xff\x05" + struct.pack("<I", counter)  # inc dword [counter]
    code += b"\xc7\x05\xb0\x00\xe0\xfe\0\0\0\0"  # mov dword [0xfee000b0], 0   EOI
    # Not iret: a KVM that emulates every instruction does not know it outside real mode. Drop the frame and wait.
    code += b"\x83\xc4\x0c" + WAIT  # add esp, 12; sti; 1: hlt; jmp 1
    address = 0x5000 + 0x40 * (vector - 0x40)
    g.memory.write(address, code)
    g.gate(vector, address)


def value(g: Guest, address: int) -> int:
    return int.from_bytes(g.memory.read(address, 4), "little")


def test_a_message_interrupts_the_processor() -> None:
    """An MSI sent by a device arrives at the vector in its data."""
    with guest(APIC_ON + WAIT, protected=True) as g:
        count_vector(g, 0x41, COUNTER)
        with g.running():
            until(lambda: value(g, READY))
            for count in range(1, 4):
                with g.lock:
                    g.accel.irqchip.send_msi(MSI_ADDRESS, 0x41)
                until(lambda count=count: value(g, COUNTER) == count)


def test_signals_of_an_irqfd_interrupt_the_processor() -> None:
    """An eventfd bound to an MSI interrupts at each signal; bound anew it brings another vector; unbound, none."""
    with guest(APIC_ON + WAIT, protected=True) as g:
        count_vector(g, 0x41, COUNTER)
        count_vector(g, 0x42, COUNTER + 4)
        fd = os.eventfd(0, os.EFD_NONBLOCK)
        try:
            assert g.accel.bind_msi(fd, MSI_ADDRESS, 0x41)
            with g.running():
                until(lambda: value(g, READY))
                for count in range(1, 4):
                    os.eventfd_write(fd, 1)
                    until(lambda count=count: value(g, COUNTER) == count)
                assert g.accel.bind_msi(fd, MSI_ADDRESS, 0x42)
                os.eventfd_write(fd, 1)
                until(lambda: value(g, COUNTER + 4) == 1)
                g.accel.unbind_msi(fd)
                os.eventfd_write(fd, 1)
                time.sleep(0.02)
            assert (value(g, COUNTER), value(g, COUNTER + 4)) == (3, 1)
            assert os.eventfd_read(fd) == 1
        finally:
            os.close(fd)


def test_the_routing_table_has_an_end() -> None:
    """Where the kernel has no route left for another message, bind_msi says no and the bound ones stay."""
    with guest(FINISH) as g:
        routing = g.accel.irqchip._routing
        # Filling it one by one would load 4,000 growing tables.
        routing._messages.update({100 + number: (MSI_ADDRESS, 0x41) for number in range(3980)})
        fds = [os.eventfd(0) for _ in range(200)]
        try:
            bound = [fd for fd in fds if g.accel.bind_msi(fd, MSI_ADDRESS, 0x41)]
            assert 0 < len(bound) < len(fds)
            g.accel.unbind_msi(bound[0])
            assert g.accel.bind_msi(fds[-1], MSI_ADDRESS, 0x41)
        finally:
            for fd in fds:
                os.close(fd)


def test_a_second_processor_starts_by_inter_processor_interrupts() -> None:
    """INIT and start-up IPIs from the first vCPU start the second one in real mode at the page they name."""
    code = (
        APIC_ON
        + b"\xc7\x05\x10\x03\xe0\xfe\0\0\0\x01"  # mov dword [0xfee00310], 1 << 24    ICR high: APIC 1
        + b"\xc7\x05\x00\x03\xe0\xfe\x00\x45\0\0"  # mov dword [0xfee00300], 0x4500     INIT
        + b"\xc7\x05\x00\x03\xe0\xfe\x09\x46\0\0"  # mov dword [0xfee00300], 0x4609     SIPI, page 9
        + b"\xeb\xfe"  # jmp .
    )
    # mov byte cs:[0x100], 0x77; mov al, 2; out DONE, al
    ap = b"\x2e\xc6\x06\x00\x01\x77" + bytes((0xB0, 0x02, 0xE6, DONE))
    with guest(code, cpus=2, protected=True) as g:
        g.memory.write(0x9000, ap)
        for _ in range(2):  # again after a reset, in which the second one waits anew
            g.run()
            assert g.memory.read(0x9100, 1) == b"\x77"
            assert g.done.log == [("w", 0, 1, 2)]
            g.memory.write(0x9100, b"\0")
            g.done.log.clear()
            g.reset()


def test_a_reset_puts_the_chips_back() -> None:
    """After a reset the PIT no longer ticks and the PIC's mask is gone, as after power-on."""
    code = pic_setup(0xFE) + b"\xb0\x34\xe6\x43\xb0\xa9\xe6\x40\xb0\x04\xe6\x40" + FINISH
    with guest(code) as g:
        irqchip = g.accel.irqchip
        fresh = irqchip._save()
        g.run()
        assert irqchip._save() != fresh
        g.reset()
        assert irqchip._save()[1:] == fresh[1:]  # but for the PIT, which holds times
        g.memory.write(ORIGIN, b"\xe4\x21\xa2\x00\x20" + FINISH)  # in al, 0x21; mov [0x2000], al
        g.run()
        assert g.memory.read(0x2000, 1) == b"\0"
