// States of threads: registers of every kind, thread-local memory, lists the kernel keeps, names, masks, stacks.
#include "states.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <sys/auxv.h>
#include <sys/prctl.h>
#include <sys/rseq.h>
#include <sys/syscall.h>

static int my_tid(void) { return (int)syscall(SYS_gettid); }

// ---- registers: a thread spins with known values in all of them, then stores them

struct image {
    uint64_t ymm[16][4];
    uint64_t general[6]; // r8 r9 r10 r13 r14 r15
    uint16_t control_word;
    uint32_t mxcsr;
    long double x87;
};

static struct {
    pthread_t thread;
    _Atomic uint32_t stop;
    _Atomic uint32_t spinning;
    struct image before, after;
} registers;

static void *spin(void *unused) {
    (void)unused;
    uint16_t control_word = 0x0c7f; // rounds to zero
    uint32_t mxcsr = 0x7f80;        // rounds to zero
    registers.before.control_word = control_word;
    registers.before.mxcsr = mxcsr;
    atomic_store(&registers.spinning, 1);
    __asm__ volatile(
        "fninit\n\tfldcw %[cw]\n\tfldpi\n\tfldl2e\n\tldmxcsr %[mx]\n\t"
        "vmovdqu 0(%[in]), %%ymm0\n\tvmovdqu 32(%[in]), %%ymm1\n\tvmovdqu 64(%[in]), %%ymm2\n\t"
        "vmovdqu 96(%[in]), %%ymm3\n\tvmovdqu 128(%[in]), %%ymm4\n\tvmovdqu 160(%[in]), %%ymm5\n\t"
        "vmovdqu 192(%[in]), %%ymm6\n\tvmovdqu 224(%[in]), %%ymm7\n\tvmovdqu 256(%[in]), %%ymm8\n\t"
        "vmovdqu 288(%[in]), %%ymm9\n\tvmovdqu 320(%[in]), %%ymm10\n\tvmovdqu 352(%[in]), %%ymm11\n\t"
        "vmovdqu 384(%[in]), %%ymm12\n\tvmovdqu 416(%[in]), %%ymm13\n\tvmovdqu 448(%[in]), %%ymm14\n\t"
        "vmovdqu 480(%[in]), %%ymm15\n\t"
        "movq 512(%[in]), %%r8\n\tmovq 520(%[in]), %%r9\n\tmovq 528(%[in]), %%r10\n\t"
        "movq 536(%[in]), %%r13\n\tmovq 544(%[in]), %%r14\n\tmovq 552(%[in]), %%r15\n\t"
        "1: pause\n\tcmpl $0, %[stop]\n\tje 1b\n\t"
        "vmovdqu %%ymm0, 0(%[out])\n\tvmovdqu %%ymm1, 32(%[out])\n\tvmovdqu %%ymm2, 64(%[out])\n\t"
        "vmovdqu %%ymm3, 96(%[out])\n\tvmovdqu %%ymm4, 128(%[out])\n\tvmovdqu %%ymm5, 160(%[out])\n\t"
        "vmovdqu %%ymm6, 192(%[out])\n\tvmovdqu %%ymm7, 224(%[out])\n\tvmovdqu %%ymm8, 256(%[out])\n\t"
        "vmovdqu %%ymm9, 288(%[out])\n\tvmovdqu %%ymm10, 320(%[out])\n\tvmovdqu %%ymm11, 352(%[out])\n\t"
        "vmovdqu %%ymm12, 384(%[out])\n\tvmovdqu %%ymm13, 416(%[out])\n\tvmovdqu %%ymm14, 448(%[out])\n\t"
        "vmovdqu %%ymm15, 480(%[out])\n\t"
        "movq %%r8, 512(%[out])\n\tmovq %%r9, 520(%[out])\n\tmovq %%r10, 528(%[out])\n\t"
        "movq %%r13, 536(%[out])\n\tmovq %%r14, 544(%[out])\n\tmovq %%r15, 552(%[out])\n\t"
        "fstp %%st(0)\n\tfstpt %[x87]\n\tfnstcw %[cw_after]\n\tstmxcsr %[mx_after]\n\tfninit\n\tvzeroupper"
        : [x87] "=m"(registers.after.x87), [cw_after] "=m"(registers.after.control_word),
          [mx_after] "=m"(registers.after.mxcsr)
        : [in] "r"(&registers.before), [out] "r"(&registers.after), [stop] "m"(registers.stop), [cw] "m"(control_word),
          [mx] "m"(mxcsr)
        : "memory", "cc", "r8", "r9", "r10", "r13", "r14", "r15", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5",
          "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "st", "st(1)", "st(2)",
          "st(3)", "st(4)", "st(5)", "st(6)", "st(7)");
    uint32_t plain = 0x1f80;
    __asm__ volatile("ldmxcsr %0" : : "m"(plain));
    return NULL;
}

static void registers_make(void) {
    if (!__builtin_cpu_supports("avx")) {
        wrong("this test needs AVX");
        return;
    }
    for (unsigned i = 0; i < 64; i++) {
        registers.before.ymm[i / 4][i % 4] = scramble(1000 + i);
    }
    for (unsigned i = 0; i < 6; i++) {
        registers.before.general[i] = scramble(2000 + i);
    }
    pthread_create(&registers.thread, NULL, spin, NULL);
    while (!atomic_load(&registers.spinning)) {
        sched_yield();
    }
    pause_us(2000);
}

static void registers_check(void) {
    atomic_store(&registers.stop, 1);
    pthread_join(registers.thread, NULL);
    for (unsigned i = 0; i < 64; i++) {
        EXPECT(registers.after.ymm[i / 4][i % 4] == registers.before.ymm[i / 4][i % 4], "ymm%u lane %u", i / 4, i % 4);
    }
    for (unsigned i = 0; i < 6; i++) {
        EXPECT(registers.after.general[i] == registers.before.general[i], "general register %u", i);
    }
    EXPECT(registers.after.control_word == registers.before.control_word, "x87 control word %x",
           registers.after.control_word);
    EXPECT(registers.after.mxcsr == registers.before.mxcsr, "mxcsr %x", registers.after.mxcsr);
    EXPECT(registers.after.x87 > 3.1415926L && registers.after.x87 < 3.1415927L, "x87 stack");
}

// ---- a set of threads, each with a name, mask, alternate stack, thread-local value, and lists of its own

enum { CREW = 4 };

struct member {
    pthread_t thread;
    int tid;
    uint64_t mask;
    void *robust_head;
    size_t robust_length;
    stack_t stack;
    char name[16];
    uint64_t fs_base;
    char wrong[200];
};

static struct {
    struct member members[CREW];
    _Atomic uint32_t standing;
    _Atomic uint32_t go;
    _Atomic uint32_t on_stack;
} crew;

static __thread uint64_t local = 1;
static __thread char local_block[3 * 4096];

static void on_alternate(int number) {
    (void)number;
    char here;
    for (unsigned i = 0; i < CREW; i++) {
        struct member *m = &crew.members[i];
        if (m->tid == my_tid() && &here >= (char *)m->stack.ss_sp &&
            &here < (char *)m->stack.ss_sp + m->stack.ss_size) {
            atomic_fetch_add(&crew.on_stack, 1);
        }
    }
}

static void member_look(struct member *m) {
    m->tid = my_tid();
    m->mask = 0;
    syscall(SYS_rt_sigprocmask, SIG_BLOCK, NULL, &m->mask, 8);
    syscall(SYS_get_robust_list, 0, &m->robust_head, &m->robust_length);
    sigaltstack(NULL, &m->stack);
    prctl(PR_GET_NAME, m->name);
    syscall(SYS_arch_prctl, 0x1003 /* ARCH_GET_FS */, &m->fs_base);
}

// The kernel keeps the CPU number in the rseq area of each thread that registered one.
static int rseq_lives(void) {
    if (__rseq_size == 0) {
        return 1; // the C library registered none
    }
    volatile struct rseq *area = (volatile struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
    cpu_set_t before;
    sched_getaffinity(0, sizeof before, &before);
    int good = 1;
    for (size_t cpu = 0; cpu < 64; cpu++) {
        cpu_set_t one;
        CPU_ZERO(&one);
        CPU_SET(cpu, &one);
        if (CPU_ISSET(cpu, &before) && sched_setaffinity(0, sizeof one, &one) == 0) {
            good = good && area->cpu_id == (uint32_t)cpu;
        }
    }
    sched_setaffinity(0, sizeof before, &before);
    return good;
}

static void *stand(void *argument) {
    struct member *m = argument;
    uint64_t i = (uint64_t)(m - crew.members);
    char name[16];
    snprintf(name, sizeof name, "crew member %lu", i);
    prctl(PR_SET_NAME, name);
    local = 100 + i;
    memset(local_block, (int)(7 + i), sizeof local_block);
    stack_t stack = {.ss_sp = malloc(65536 + i * 4096), .ss_size = 65536 + i * 4096};
    sigaltstack(&stack, NULL);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGRTMIN + 5 + (int)i);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    member_look(m);
    struct member before = *m;
    atomic_fetch_add(&crew.standing, 1);
    while (!atomic_load(&crew.go)) {
        syscall(SYS_futex, &crew.go, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0);
    }
    struct member after;
    memset(&after, 0, sizeof after);
    member_look(&after);
    const char *bad = NULL;
    if (after.tid != before.tid) {
        bad = "thread id";
    } else if (after.mask != before.mask) {
        bad = "signal mask";
    } else if (after.robust_head != before.robust_head || after.robust_length != before.robust_length) {
        bad = "robust list";
    } else if (after.stack.ss_sp != before.stack.ss_sp || after.stack.ss_size != before.stack.ss_size) {
        bad = "alternate stack";
    } else if (strcmp(after.name, before.name) != 0) {
        bad = "name";
    } else if (after.fs_base != before.fs_base || local != 100 + i || local_block[12000] != (char)(7 + i)) {
        bad = "thread-local memory";
    } else if (!rseq_lives()) {
        bad = "rseq";
    } else if (pthread_self() != before.thread && before.thread) {
        bad = "pthread_self";
    }
    raise(SIGUSR1); // its handler runs on the alternate stack
    if (bad) {
        snprintf(m->wrong, sizeof m->wrong, "%s of thread %lu (%d)", bad, i, before.tid);
    }
    return (void *)(i + 1);
}

static void crew_make(void) {
    struct sigaction action = {.sa_handler = on_alternate, .sa_flags = SA_ONSTACK};
    sigaction(SIGUSR1, &action, NULL);
    for (unsigned i = 0; i < CREW; i++) {
        pthread_create(&crew.members[i].thread, NULL, stand, &crew.members[i]);
    }
    while (atomic_load(&crew.standing) < CREW) {
        pause_us(200);
    }
}

static void crew_check(void) {
    atomic_store(&crew.go, 1);
    syscall(SYS_futex, &crew.go, FUTEX_WAKE_PRIVATE, CREW, NULL, NULL, 0);
    for (uint64_t i = 0; i < CREW; i++) {
        void *result = NULL;
        pthread_join(crew.members[i].thread, &result); // needs clear_child_tid
        EXPECT((uint64_t)result == i + 1, "joined with %p", result);
        EXPECT(!crew.members[i].wrong[0], "%s", crew.members[i].wrong);
    }
    EXPECT(atomic_load(&crew.on_stack) == CREW, "%u handlers of %d ran on their alternate stack",
           atomic_load(&crew.on_stack), CREW);
}

// ---- new threads can be made, and the leader knows itself

static int leader_pid;

static void leader_make(void) { leader_pid = getpid(); }

static void *leaf(void *argument) { return (char *)argument + 1; }

static void leader_check(void) {
    EXPECT(getpid() == leader_pid && my_tid() == leader_pid, "pid %d, was %d", getpid(), leader_pid);
    EXPECT(rseq_lives(), "rseq of the leader");
    pthread_t thread;
    void *result = NULL;
    EXPECT(pthread_create(&thread, NULL, leaf, (void *)41) == 0, "no new thread");
    pthread_join(thread, &result);
    EXPECT(result == (void *)42, "a new thread gave %p", result);
    // the vdso is where the C library thinks it is, and tells the same time as the kernel
    struct timespec fast, slow;
    clock_gettime(CLOCK_MONOTONIC, &fast);
    syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &slow);
    long apart_us = (slow.tv_sec - fast.tv_sec) * 1000000 + (slow.tv_nsec - fast.tv_nsec) / 1000;
    EXPECT(apart_us >= 0 && apart_us < 1000000, "the vdso's clock is %ld us off", apart_us);
    EXPECT(memcmp((void *)getauxval(AT_SYSINFO_EHDR), "\177ELF", 4) == 0, "no vdso");
}

struct state thread_states[] = {
    {.name = "registers", .make = registers_make, .check = registers_check},
    {.name = "crew", .make = crew_make, .check = crew_check},
    {.name = "leader", .make = leader_make, .check = leader_check},
    {.name = NULL},
};
