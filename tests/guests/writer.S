# A boot sector that writes for ever: pseudo-random sectors by ATA PIO, a FLUSH CACHE after every eighth, and then a
# line "F" + the number of writes so far on the first serial port. tests/crash replays the same sequence and so knows
# what every sector must hold after the machine was killed.
#
#   write number i goes to LBA 64 + ((i * 0x9E3779B1) >> 16 & 0x3fff)
#   and consists of 128 words w(0) = i * 0x9E3779B1 + 12345, w(n+1) = w(n) * 1664525 + 1013904223

        .code16
        .globl  _start
_start: ljmp    $0, $begin
begin:  cli
        cld
        xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movw    $0x7c00, %sp
        movw    $0x3f6, %dx             # no interrupts from the drive
        movb    $2, %al
        outb    %al, %dx
        xorl    %ebp, %ebp              # i

write:  imull   $0x9E3779B1, %ebp, %eax
        movl    %eax, %ebx
        addl    $12345, %eax
        movw    $0x8000, %di
        movw    $128, %cx
1:      stosl
        imull   $1664525, %eax, %eax
        addl    $1013904223, %eax
        loop    1b

        shrl    $16, %ebx
        andl    $0x3fff, %ebx
        addl    $64, %ebx

        movw    $0x1f6, %dx             # drive 0, LBA
        movb    $0xe0, %al
        outb    %al, %dx
        call    idle
        movw    $0x1f2, %dx             # one sector
        movb    $1, %al
        outb    %al, %dx
        incw    %dx
        movb    %bl, %al
        outb    %al, %dx
        incw    %dx
        movb    %bh, %al
        outb    %al, %dx
        incw    %dx
        shrl    $16, %ebx
        movb    %bl, %al
        outb    %al, %dx
        movw    $0x1f7, %dx
        movb    $0x30, %al              # WRITE SECTORS
        outb    %al, %dx
2:      inb     %dx, %al                # until BSY is clear and DRQ is set
        andb    $0x88, %al
        cmpb    $0x08, %al
        jne     2b
        movw    $0x8000, %si
        movw    $256, %cx
        movw    $0x1f0, %dx
        rep outsw
        call    idle
        incl    %ebp
        testw   $7, %bp
        jnz     write

        movw    $0x1f7, %dx
        movb    $0xe7, %al              # FLUSH CACHE
        outb    %al, %dx
        call    idle
        movb    $'F', %al
        call    send
        movl    %ebp, %ebx
        movw    $8, %cx
3:      roll    $4, %ebx
        movb    %bl, %al
        andb    $15, %al
        addb    $'0', %al
        cmpb    $'9', %al
        jbe     4f
        addb    $('a' - '9' - 1), %al
4:      call    send
        loop    3b
        movb    $'\n', %al
        call    send
        jmp     write

idle:   movw    $0x1f7, %dx
5:      inb     %dx, %al
        testb   $0x80, %al
        jnz     5b
        testb   $0x21, %al              # ERR or DF
        jnz     fail
        ret

send:   pushw   %dx
        pushw   %ax
        movw    $0x3fd, %dx
6:      inb     %dx, %al
        testb   $0x20, %al
        jz      6b
        popw    %ax
        movw    $0x3f8, %dx
        outb    %al, %dx
        popw    %dx
        ret

fail:   movb    $'E', %al
        call    send
        movb    $'\n', %al
        call    send
        hlt
        jmp     fail

        .org    510
        .byte   0x55, 0xaa
