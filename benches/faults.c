/* What a fault costs in bare C, by the same three mechanisms as quire's backends, filling from a buffer. Built and called by
 * benches/faults.py. Every function returns the mean nanoseconds of a touch, or a negative errno. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e9 + t.tv_nsec;
}

/* Touch one byte at each offset, in the order given. */
double touch(const volatile char *base, const uint64_t *offsets, size_t count) {
    double start = now();
    for (size_t i = 0; i < count; i++) (void)base[offsets[i]];
    return (now() - start) / count;
}

static char *base, *alias, *source;
static size_t length, window;
static int uffd, give;

static int open_uffd(uint64_t features) {
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    int fd = device >= 0 ? ioctl(device, _IO(0xAA, 0), O_CLOEXEC) : -1;
    if (device >= 0) close(device);
    if (fd < 0) fd = syscall(SYS_userfaultfd, O_CLOEXEC);
    struct uffdio_api api = {.api = UFFD_API, .features = features};
    if (fd < 0 || ioctl(fd, UFFDIO_API, &api)) return -1;
    struct uffdio_register reg = {.range = {(uintptr_t)base, length}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    return ioctl(fd, UFFDIO_REGISTER, &reg) ? -1 : fd;
}

static size_t begin(uintptr_t address) { return (address - (uintptr_t)base) / window * window; }

static size_t bytes_at(size_t at) { return length - at < window ? length - at : window; }

static void copy(size_t at) {
    struct uffdio_copy arg = {.dst = (uintptr_t)base + at, .src = (uintptr_t)source + at, .len = bytes_at(at)};
    ioctl(uffd, UFFDIO_COPY, &arg);
    if (give) madvise(base + at, bytes_at(at), MADV_FREE);
}

static void *serve(void *unused) {
    (void)unused;
    struct uffd_msg message;
    while (read(uffd, &message, sizeof message) == sizeof message) copy(begin(message.arg.pagefault.address));
    return NULL;
}

static void on_sigbus(int number, siginfo_t *info, void *context) {
    (void)number, (void)context;
    copy(begin((uintptr_t)info->si_addr));
}

static void on_sigsegv(int number, siginfo_t *info, void *context) {
    (void)number, (void)context;
    size_t at = begin((uintptr_t)info->si_addr);
    memcpy(alias + at, source + at, bytes_at(at));
    mprotect(base + at, bytes_at(at), PROT_READ);
}

/* mechanism: 0 thread, 1 SIGBUS, 2 SIGSEGV; give_pages: let the kernel drop what was filled */
double bare(int mechanism, int give_pages, char *from, size_t size, size_t window_bytes, const uint64_t *offsets, size_t count) {
    struct sigaction action = {.sa_flags = SA_SIGINFO}, old;
    pthread_t thread;
    double result;
    source = from, length = size, window = window_bytes, give = give_pages;
    if (mechanism == 2) {
        int file = memfd_create("bare", MFD_CLOEXEC);
        if (file < 0 || ftruncate(file, size)) return -errno;
        base = mmap(NULL, size, PROT_NONE, MAP_SHARED, file, 0);
        alias = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        close(file);
        action.sa_sigaction = on_sigsegv;
        sigaction(SIGSEGV, &action, &old);
        result = touch(base, offsets, count);
        sigaction(SIGSEGV, &old, NULL);
        munmap(alias, size);
    } else {
        base = mmap(NULL, size, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        madvise(base, size, MADV_NOHUGEPAGE);
        uffd = open_uffd(mechanism == 1 ? UFFD_FEATURE_SIGBUS : 0);
        if (uffd < 0) return -errno;
        if (mechanism == 1) {
            action.sa_sigaction = on_sigbus;
            sigaction(SIGBUS, &action, &old);
            result = touch(base, offsets, count);
            sigaction(SIGBUS, &old, NULL);
        } else {
            pthread_create(&thread, NULL, serve, NULL);
            result = touch(base, offsets, count);
            pthread_cancel(thread);
            pthread_join(thread, NULL);
        }
        close(uffd);
    }
    munmap(base, size);
    return result;
}
