//! A child process that makes a list of system calls and runs nothing else, so that everything but the list and one
//! page of code can be unmapped from it.
//!
//! A record of the list is ten words, in the byte order of the machine: the number of the call, six arguments, its
//! result, the address of the next record, and the address of the next one if the result is 0. A list ends with a call
//! that does not return.
#![allow(unsafe_code)]

use std::io;

#[cfg(target_arch = "x86_64")]
std::arch::global_asm!(
    ".pushsection .text.quire_calls, \"ax\", @progbits",
    ".balign 128",
    ".globl quire_calls_begin",
    ".hidden quire_calls_begin",
    "quire_calls_begin:",
    "mov rbx, rdi",
    "2:",
    "mov rax, [rbx]",
    "mov rdi, [rbx + 8]",
    "mov rsi, [rbx + 16]",
    "mov rdx, [rbx + 24]",
    "mov r10, [rbx + 32]",
    "mov r8, [rbx + 40]",
    "mov r9, [rbx + 48]",
    "syscall",
    "mov [rbx + 56], rax",
    "mov rcx, [rbx + 64]",
    "test rax, rax",
    "cmovz rcx, [rbx + 72]",
    "mov rbx, rcx",
    "jmp 2b",
    ".balign 128",
    ".popsection",
);

#[cfg(target_arch = "aarch64")]
std::arch::global_asm!(
    ".pushsection .text.quire_calls, \"ax\", @progbits",
    ".balign 128",
    ".globl quire_calls_begin",
    ".hidden quire_calls_begin",
    "quire_calls_begin:",
    "mov x19, x0",
    "2:",
    "ldr x8, [x19]",
    "ldp x0, x1, [x19, #8]",
    "ldp x2, x3, [x19, #24]",
    "ldp x4, x5, [x19, #40]",
    "svc #0",
    "str x0, [x19, #56]",
    "ldp x9, x10, [x19, #64]",
    "cmp x0, #0",
    "csel x19, x10, x9, eq",
    "b 2b",
    ".balign 128",
    ".popsection",
);

unsafe extern "C" {
    fn quire_calls_begin(first: usize) -> !;
}

/// Where the code is that a child runs; it lies in one page.
#[must_use]
pub fn code_address() -> usize {
    quire_calls_begin as *const () as usize
}

/// Fork a child that makes the calls of a list, whose first record is at this address; its pid.
///
/// The child has the address space of this process and one thread; it never returns. Only the child reads the list, so
/// an address where none is ends the child with a signal. What it writes to memory shared with it is the list's doing.
pub fn spawn(first: usize) -> io::Result<i32> {
    // SAFETY: clone with only a signal is fork: the child runs on a copy of this stack. Between it and the list nothing
    // of the C library runs there that could depend on other threads, and the list's code uses no stack.
    let pid = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: as above, and these calls concern the child only.
        0 => unsafe {
            forget_rseq();
            quire_calls_begin(first)
        },
        pid => i32::try_from(pid).map_err(io::Error::other),
    }
}

/// Tell the kernel to write no more to the restartable sequences' area of this thread: it would end the child once that
/// memory is unmapped.
///
/// # Safety
///
/// Nothing that uses restartable sequences may run in this thread afterwards.
unsafe fn forget_rseq() {
    const UNREGISTER: libc::c_int = 1;
    #[cfg(target_arch = "x86_64")]
    const SIGNATURE: u32 = 0x5305_3053;
    #[cfg(target_arch = "aarch64")]
    const SIGNATURE: u32 = 0xd428_bc00;
    let thread: usize;
    // SAFETY: reads the thread pointer; the symbol, if the C library has it, is an integer that never changes.
    unsafe {
        let offset = libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_offset".as_ptr()).cast::<isize>();
        if offset.is_null() {
            return;
        }
        #[cfg(target_arch = "x86_64")]
        std::arch::asm!("mov {}, fs:[0]", out(reg) thread, options(nostack, readonly, preserves_flags));
        #[cfg(target_arch = "aarch64")]
        std::arch::asm!("mrs {}, tpidr_el0", out(reg) thread, options(nostack, nomem, preserves_flags));
        let area = thread.wrapping_add_signed(*offset);
        // The length is that of registration, which the C library does not tell; another is refused.
        for length in (32..=512).step_by(4) {
            if libc::syscall(libc::SYS_rseq, area, length, UNREGISTER, SIGNATURE) == 0 {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_followed_by_result() {
        let record = |number: i64, argument: u64| [number as u64, argument, 0, 0, 0, 0, 0, u64::MAX, 0, 0];
        let mut list = [
            record(libc::SYS_getppid, 0),
            record(libc::SYS_exit_group, 3),
            record(libc::SYS_close, u64::from(u32::MAX)),
            record(libc::SYS_exit_group, 4),
        ];
        // A call that fails is followed by `next`, one that returns 0 by the other: getppid returns a pid.
        let at = |index: usize, list: &[[u64; 10]; 4]| (&raw const list[index]) as u64;
        (list[0][8], list[0][9]) = (at(2, &list), at(1, &list));
        (list[2][8], list[2][9]) = (at(3, &list), at(1, &list));
        let pid = spawn(at(0, &list) as usize).unwrap();
        let mut status = 0;
        // SAFETY: the status is a local that outlives the call.
        assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
        assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 4);
    }

    #[test]
    fn the_code_lies_in_one_page() {
        assert_eq!(code_address() % 128, 0);
    }
}
