"""Local APIC and I/O APIC: priorities, ends of interrupts, the timer, levels and edges, and the 8259As behind them."""

from __future__ import annotations

import pytest

from vm_core.machine.chipset.apicbus import ApicBus, ApicMessage, DeliveryMode
from vm_core.machine.chipset.apics import ApicInterrupts
from vm_core.machine.chipset.ioapic import IoApic
from vm_core.machine.chipset.lapic import LocalApic
from vm_core.machine.chipset.pic import PicPair, PicPorts
from vm_core.machine.clock import ManualClock
from vm_core.machine.memory import GuestMemory

# Offsets of registers (Intel SDM vol. 3, table 11-1).
ID, VERSION, TPR, PPR, EOI, LDR, DFR, SVR = 0x20, 0x30, 0x80, 0xA0, 0xB0, 0xD0, 0xE0, 0xF0
ISR, TMR, IRR, ESR, ICR_LOW, ICR_HIGH = 0x100, 0x180, 0x200, 0x280, 0x300, 0x310
LVT_TIMER, LINT0, LVT_ERROR = 0x320, 0x350, 0x370
INITIAL, CURRENT, DIVIDE = 0x380, 0x390, 0x3E0
PERIODIC, MASKED = 1 << 17, 1 << 16


class Board:
    """One local APIC with an I/O APIC and a pair of 8259As, and a count of wake-ups."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.wakes = 0
        self.pic = PicPair()
        self.pic.master.imr = self.pic.slave.imr = 0xFF
        self.memory = GuestMemory(4096)
        self.irqs = ApicInterrupts(self.pic, self.memory, self.clock, self._wake)
        self.cpu = self.irqs.lapic
        self.ioapic = self.irqs.ioapic

    def _wake(self) -> None:
        self.wakes += 1

    def enable(self) -> Board:
        self.cpu.write(SVR, 4, 0x1FF)
        return self

    def get(self, offset: int) -> int:
        return self.cpu.read(offset, 4)

    def put(self, offset: int, value: int) -> None:
        self.cpu.write(offset, 4, value)

    def send(self, vector: int) -> None:
        self.irqs.send_msi(0xFEE00000, vector)

    def redirect(self, number: int, low: int, high: int = 0) -> None:
        for index, value in ((0x11 + 2 * number, high), (0x10 + 2 * number, low)):
            self.ioapic.write(0, 1, index)
            self.ioapic.write(0x10, 4, value)

    def entry(self, number: int) -> int:
        self.ioapic.write(0, 1, 0x10 + 2 * number)
        return self.ioapic.read(0x10, 4)


def test_reset_values_are_those_of_the_manual() -> None:
    """After RESET the registers read as the manual says, with LINT0 as firmware leaves it."""
    board = Board()
    expected = {
        ID: 0,
        VERSION: 0x00050014,
        TPR: 0,
        PPR: 0,
        LDR: 0,
        DFR: 0xFFFFFFFF,
        SVR: 0xFF,
        LVT_TIMER: MASKED,
        LVT_ERROR: MASKED,
        0x360: MASKED,
        LINT0: 0x700,
        INITIAL: 0,
        CURRENT: 0,
        DIVIDE: 0,
    }
    assert {at: board.get(at) for at in expected} == expected
    assert not any(board.get(at) for at in range(ISR, ESR, 16))
    assert not board.cpu.pending()


def test_a_message_is_taken_and_ended() -> None:
    """A message wakes the processor, moves from IRR to ISR when it is taken, and leaves ISR at the EOI."""
    board = Board().enable()
    board.send(0x51)
    assert board.wakes
    assert board.get(IRR + 0x20) == 1 << 17
    assert board.cpu.pending()
    assert board.cpu.acknowledge() == 0x51
    assert (board.get(IRR + 0x20), board.get(ISR + 0x20)) == (0, 1 << 17)
    assert board.get(PPR) == 0x50
    assert not board.cpu.pending()
    board.put(EOI, 0)
    assert (board.get(ISR + 0x20), board.get(PPR)) == (0, 0)


def test_more_important_interrupts_come_first_and_less_important_wait() -> None:
    """A higher class interrupts a lower one that is in service; the same and lower classes wait for its end."""
    board = Board().enable()
    for vector in (0x41, 0x62, 0x63):
        board.send(vector)
    assert board.cpu.acknowledge() == 0x63
    assert not board.cpu.pending()  # 0x62 is of the same class
    board.send(0x71)
    assert board.cpu.acknowledge() == 0x71
    board.put(EOI, 0)
    assert not board.cpu.pending()
    board.put(EOI, 0)
    assert board.cpu.acknowledge() == 0x62
    board.put(EOI, 0)
    assert board.cpu.acknowledge() == 0x41
    assert board.cpu.acknowledge() == 0xFF  # nothing is left: the spurious vector
    assert board.get(ISR + 0x70) == 0  # which is not in service


def test_the_task_priority_holds_interrupts_back() -> None:
    """Vectors whose class is not above TPR wait, and the write that lowers TPR wakes the processor for them."""
    board = Board().enable()
    board.put(TPR, 0x50)
    board.send(0x5F)
    assert not board.cpu.pending()
    board.send(0x60)
    assert board.cpu.pending()
    assert board.cpu.acknowledge() == 0x60
    board.put(EOI, 0)
    wakes = board.wakes
    board.put(TPR, 0x40)
    assert board.wakes == wakes + 1
    assert board.cpu.acknowledge() == 0x5F


def test_an_apic_that_is_switched_off_refuses_messages_and_masks_its_vectors() -> None:
    """With bit 8 of SVR clear messages are lost, and local vectors are and stay masked."""
    board = Board()
    board.send(0x51)
    assert not board.cpu.pending()
    board.put(LVT_TIMER, 0x40)
    assert board.get(LVT_TIMER) == MASKED | 0x40
    board.enable()
    board.put(LVT_TIMER, 0x40)
    assert board.get(LVT_TIMER) == 0x40
    board.put(SVR, 0xFF)
    assert board.get(LVT_TIMER) == MASKED | 0x40
    assert board.get(LINT0) == MASKED | 0x700


def test_only_aligned_dwords_write_registers() -> None:
    """Byte, word and misaligned writes have no effect; bytes of a register can be read."""
    board = Board().enable()
    board.cpu.write(TPR, 1, 0x30)
    board.cpu.write(TPR + 4, 4, 0x30)
    assert board.get(TPR) == 0
    assert board.cpu.read(VERSION, 1) == 0x14
    assert board.cpu.read(VERSION + 2, 2) == 5
    assert board.cpu.read(VERSION + 4, 4) == 0


# The 8259As behind LINT0.


def pic_on(board: Board) -> None:
    """The pair at vectors 0x20 and 0x28, nothing masked."""
    for chip, base, third in ((board.pic.master, 0x20, 4), (board.pic.slave, 0x28, 2)):
        ports = PicPorts(board.pic, chip)
        ports.write(0, 1, 0x11)
        for value in (base, third, 1, 0):
            ports.write(1, 1, value)


def test_a_guest_that_knows_no_apic_finds_the_8259as() -> None:
    """With the APIC as it is after RESET, a line of the 8259As interrupts and is acknowledged by them."""
    board = Board()
    pic_on(board)
    board.irqs.set_irq(5, True)
    assert board.wakes
    assert board.cpu.pending()
    assert board.cpu.acknowledge() == 0x25
    assert board.pic.master.isr == 1 << 5


def test_masking_lint0_cuts_the_8259as_off() -> None:
    """A masked LINT0 passes nothing on; unmasked, it wakes the processor for what still waits."""
    board = Board().enable()
    pic_on(board)
    board.put(LINT0, MASKED | 0x700)
    board.irqs.set_irq(5, True)
    assert not board.cpu.pending()
    wakes = board.wakes
    board.put(LINT0, 0x700)
    assert board.wakes > wakes
    assert board.cpu.acknowledge() == 0x25


def test_messages_come_before_the_8259as() -> None:
    """Where both wait, the acknowledge cycle takes the local APIC's vector, then the 8259As'."""
    board = Board().enable()
    pic_on(board)
    board.irqs.set_irq(5, True)
    board.send(0x31)
    assert [board.cpu.acknowledge(), board.cpu.acknowledge()] == [0x31, 0x25]


# The timer.


def ticks(board: Board, nanoseconds: int, step: int = 100) -> list[int]:
    """Moments at which the timer's vector became pending; each is taken and ended."""
    found = []
    end = board.clock.now_ns() + nanoseconds
    while board.clock.now_ns() < end:
        board.clock.advance(step)
        if board.cpu.pending():
            assert board.cpu.acknowledge() == 0x40
            board.put(EOI, 0)
            found.append(board.clock.now_ns())
    return found


def test_a_one_shot_timer_fires_once() -> None:
    """Written, the initial count counts down at the divided clock, interrupts at zero, and stays there."""
    board = Board().enable()
    board.put(LVT_TIMER, 0x40)
    board.put(DIVIDE, 3)  # by 16
    board.put(INITIAL, 1000)
    board.clock.advance(4000)
    assert board.get(CURRENT) == 750
    assert ticks(board, 40000) == [16000]
    assert board.get(CURRENT) == 0
    board.put(INITIAL, 1000)
    assert len(ticks(board, 40000)) == 1


class HastyClock(ManualClock):
    """Every look at it takes a microsecond."""

    def now_ns(self) -> int:
        self._now += 1000
        return self._now


def test_a_count_that_is_over_before_the_write_returns_still_interrupts() -> None:
    """A one-shot count shorter than the write of it takes is not lost, however often it is written."""
    clock = HastyClock()
    cpu = LocalApic(0, ApicBus(), clock, lambda: None)
    cpu.write(SVR, 4, 0x1FF)
    cpu.write(DIVIDE, 4, 11)
    cpu.write(LVT_TIMER, 4, 0x40)
    for _ in range(3):
        cpu.write(INITIAL, 4, 15)
        clock.run_due()
        assert cpu.acknowledge() == 0x40
        cpu.write(EOI, 4, 0)


@pytest.mark.parametrize(("code", "divisor"), [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)])
def test_the_divider_is_that_of_the_manual(code: int, divisor: int) -> None:
    """Bits 0, 1 and 3 of the divide register select 2 to 128, and 1."""
    board = Board().enable()
    board.put(DIVIDE, code)
    board.put(INITIAL, 100_000)
    board.clock.advance(50_000 * divisor)
    assert board.get(CURRENT) == 50_000


def test_a_periodic_timer_keeps_its_pace() -> None:
    """A periodic timer fires at every multiple of its period, and stops when its count is set to zero."""
    board = Board().enable()
    board.put(LVT_TIMER, PERIODIC | 0x40)
    board.put(DIVIDE, 11)
    board.put(INITIAL, 1_000_000)
    assert ticks(board, 3_500_000) == [1_000_000, 2_000_000, 3_000_000]
    assert board.get(CURRENT) == 500_000
    board.put(INITIAL, 0)
    assert ticks(board, 3_000_000) == []


def test_a_timer_that_is_too_fast_does_not_hold_the_machine_up() -> None:
    """A period of a nanosecond gives no more than ten thousand interrupts a second."""
    board = Board().enable()
    board.put(LVT_TIMER, PERIODIC | 0x40)
    board.put(DIVIDE, 11)
    board.put(INITIAL, 1)
    assert 9 <= len(ticks(board, 1_000_000)) <= 11


def test_a_masked_timer_counts_without_interrupting() -> None:
    """A masked timer runs, and its zero is not remembered."""
    board = Board().enable()
    board.put(DIVIDE, 11)
    board.put(INITIAL, 1000)
    assert ticks(board, 2000) == []
    board.put(LVT_TIMER, 0x40)
    assert ticks(board, 2000) == []


# Messages between processors.


def test_a_processor_interrupts_itself() -> None:
    """ICR with the shorthand "self", and with this APIC as destination, delivers here; "all but self" does not."""
    board = Board().enable()
    board.put(ICR_LOW, 1 << 18 | 0x61)
    assert board.cpu.acknowledge() == 0x61
    board.put(EOI, 0)
    board.put(ICR_HIGH, 0)
    board.put(ICR_LOW, 0x62)
    assert board.cpu.acknowledge() == 0x62
    board.put(EOI, 0)
    board.put(ICR_LOW, 2 << 18 | 0x63)
    assert board.cpu.acknowledge() == 0x63
    board.put(EOI, 0)
    board.put(ICR_LOW, 3 << 18 | 0x64)
    board.put(ICR_HIGH, 5 << 24)
    board.put(ICR_LOW, 0x65)
    assert not board.cpu.pending()
    assert board.get(ICR_LOW) == 0x65  # delivery status reads 0: sent


def test_illegal_vectors_are_errors() -> None:
    """A vector below 16 is noted in ESR, which shows it after a write, and raises the error vector."""
    board = Board().enable()
    board.put(LVT_ERROR, 0x7F)
    board.put(ICR_LOW, 0x05)
    assert board.cpu.acknowledge() == 0x7F
    assert board.get(ESR) == 0
    board.put(ESR, 0)
    assert board.get(ESR) == 1 << 5
    board.put(ESR, 0)
    assert board.get(ESR) == 0
    board.send(0x02)
    board.put(ESR, 0)
    assert board.get(ESR) == 1 << 6


def several(count: int) -> tuple[ApicBus, list[LocalApic]]:
    bus = ApicBus()
    apics = [LocalApic(number, bus, ManualClock(), lambda: None) for number in range(count)]
    for apic in apics:
        apic.write(SVR, 4, 0x1FF)
    return bus, apics


@pytest.mark.parametrize(
    ("destination", "logical", "expected"),
    [(2, False, {2}), (0xFF, False, {0, 1, 2, 3}), (0x0A, True, {1, 3}), (0xFF, True, {0, 1, 2, 3}), (9, False, set())],
)
def test_messages_find_their_processors(destination: int, logical: bool, expected: set[int]) -> None:
    """Physical destinations name one APIC or all, logical ones in the flat model a set of bits."""
    bus, apics = several(4)
    for number, apic in enumerate(apics):
        apic.write(LDR, 4, 1 << 24 + number)
    assert bus.deliver(ApicMessage(0x50, destination, logical=logical)) == bool(expected)
    assert {apic.id for apic in apics if apic.pending()} == expected


def test_devices_choose_physical_and_logical_destinations() -> None:
    """Bit 2 of a message's address makes its destination logical; other addresses are no messages."""
    bus, apics = several(3)
    for number, apic in enumerate(apics):
        apic.write(LDR, 4, 1 << 24 + number)
    assert bus.deliver_msi(0xFEE01000, 0x50)
    assert bus.deliver_msi(0xFEE01004, 0x51)
    assert bus.deliver_msi(0xFEE0400C, 0x52)
    assert not bus.deliver_msi(0xFED01000, 0x53)
    assert [apic.acknowledge() if apic.pending() else None for apic in apics] == [0x51, 0x50, 0x52]


def test_logical_destinations_in_the_cluster_model_name_cluster_and_members() -> None:
    """In the cluster model the upper half names the cluster, the lower half its members."""
    bus, apics = several(4)
    for apic, address in zip(apics, (0x11, 0x12, 0x21, 0x22), strict=True):
        apic.write(DFR, 4, 0x0FFFFFFF)
        apic.write(LDR, 4, address << 24)
    bus.deliver(ApicMessage(0x50, 0x13, logical=True))
    assert [apic.pending() for apic in apics] == [True, True, False, False]
    bus.deliver(ApicMessage(0x51, 0xF2, logical=True))
    assert [bool(apic.read(IRR + 0x20, 4) & 1 << 17) for apic in apics] == [False, True, False, True]


def test_lowest_priority_goes_to_the_least_busy_processor() -> None:
    """A lowest-priority message reaches one processor: that with the lowest priority, of those switched on."""
    bus, apics = several(3)
    apics[0].write(TPR, 4, 0x40)
    apics[1].write(SVR, 4, 0xFF)
    assert bus.deliver(ApicMessage(0x50, 0xFF, DeliveryMode.LOWEST_PRIORITY))
    assert [apic.pending() for apic in apics] == [False, False, True]


# The I/O APIC.


def test_an_edge_becomes_one_message() -> None:
    """A rising edge at an input sends its vector once, however long the line stays up."""
    board = Board().enable()
    board.redirect(4, 0x54)
    board.irqs.set_irq(4, True)
    assert board.cpu.acknowledge() == 0x54
    board.put(EOI, 0)
    assert not board.cpu.pending()
    board.irqs.set_irq(4, False)
    board.irqs.set_irq(4, True)
    assert board.cpu.acknowledge() == 0x54


def test_an_edge_at_a_masked_input_is_lost() -> None:
    """An edge while the input is masked is neither delivered nor remembered."""
    board = Board().enable()
    board.redirect(4, MASKED | 0x54)
    board.irqs.set_irq(4, True)
    board.redirect(4, 0x54)
    assert not board.cpu.pending()


def test_a_level_interrupts_again_after_its_end_while_it_lasts() -> None:
    """A level-triggered input waits for the EOI of its message (remote IRR), and repeats it while the line is up."""
    board = Board().enable()
    board.redirect(11, 1 << 15 | 0x5B)
    board.irqs.set_irq(11, True)
    assert board.get(TMR + 0x20) == 1 << 27
    assert board.entry(11) == 1 << 15 | 1 << 14 | 0x5B
    assert board.cpu.acknowledge() == 0x5B
    board.redirect(11, 1 << 15 | 0x5B)  # written anew it does not repeat before the end
    assert not board.cpu.pending()
    board.put(EOI, 0)
    assert board.cpu.acknowledge() == 0x5B
    board.irqs.set_irq(11, False)
    board.put(EOI, 0)
    assert not board.cpu.pending()
    assert board.entry(11) == 1 << 15 | 0x5B


def test_a_level_at_a_masked_input_is_seen_when_it_is_unmasked() -> None:
    """A line that went up while its level-triggered input was masked interrupts at the unmasking write."""
    board = Board().enable()
    board.redirect(11, MASKED | 1 << 15 | 0x5B)
    board.irqs.set_irq(11, True)
    assert not board.cpu.pending()
    board.redirect(11, 1 << 15 | 0x5B)
    assert board.cpu.acknowledge() == 0x5B


def test_the_timer_line_is_input_2() -> None:
    """IRQ 0 arrives at input 2, and nothing else does."""
    board = Board().enable()
    board.redirect(0, 0x50)
    board.redirect(2, 0x52)
    board.irqs.set_irq(2, True)
    assert not board.cpu.pending()
    board.irqs.set_irq(0, True)
    assert board.cpu.acknowledge() == 0x52


def test_inputs_above_the_isa_lines_work() -> None:
    """Inputs 16 to 23 exist on the I/O APIC alone."""
    board = Board().enable()
    board.redirect(23, 0x57)
    board.irqs.set_irq(23, True)
    assert board.cpu.acknowledge() == 0x57
    board.irqs.set_irq(24, True)  # nobody's


def test_ioapic_registers_read_as_the_data_sheet_says() -> None:
    """ID, version with 24 inputs, arbitration ID, and read-only bits of an entry that writes do not change."""
    board = Board()
    ioapic = board.ioapic
    ioapic.write(0, 1, 1)
    assert ioapic.read(0x10, 4) == 0x00170011
    ioapic.write(0, 1, 0)
    ioapic.write(0x10, 4, 0xFF000000)
    assert ioapic.read(0x10, 4) == 0x0F000000
    ioapic.write(0, 1, 2)
    assert ioapic.read(0x10, 4) == 0x0F000000
    board.redirect(1, 0xFFFFFFFF, 0xFFFFFFFF)
    assert board.entry(1) == 0x0001AFFF
    ioapic.write(0, 1, 0x13)
    assert ioapic.read(0x10, 4) == 0xFF000000
    assert ioapic.read(0, 1) == 0x13
    ioapic.write(0, 1, 0x40)
    ioapic.write(0x10, 4, 1)
    assert ioapic.read(0x10, 4) == 0


def test_a_level_that_no_processor_takes_does_not_hang_in_remote_irr() -> None:
    """A level sent while the local APIC is off leaves the input able to interrupt later."""
    bus = ApicBus()
    ioapic = IoApic(bus)
    apic = LocalApic(0, bus, ManualClock(), lambda: None)
    ioapic.write(0, 1, 0x10 + 2 * 5)
    ioapic.write(0x10, 4, 1 << 15 | 0x55)
    ioapic.set_input(5, True)
    assert ioapic.read(0x10, 4) == 1 << 15 | 0x55
    apic.write(SVR, 4, 0x1FF)
    ioapic.write(0x10, 4, 1 << 15 | 0x55)
    assert apic.acknowledge() == 0x55


def test_reset_forgets_everything_but_the_lines() -> None:
    """After a reset entries are masked and nothing is pending or in service, and a line that is up still is."""
    board = Board().enable()
    board.redirect(11, 1 << 15 | 0x5B)
    board.irqs.set_irq(11, True)
    board.irqs.reset()
    assert not board.cpu.pending()
    assert board.entry(11) == MASKED
    board.enable()
    board.redirect(11, 1 << 15 | 0x5B)
    assert board.cpu.acknowledge() == 0x5B


def test_the_registers_appear_where_a_pc_has_them() -> None:
    """The local APIC's page is at 0xFEE00000, the I/O APIC's at 0xFEC00000."""
    board = Board()
    local, other = board.memory.find(0xFEE00FFF), board.memory.find(0xFEC00010)
    assert local is not None
    assert other is not None
    assert local.region.handler is board.cpu
    assert other.region.handler is board.ioapic
