// The window after T0 as the tracer sees it. Always: thread ends, new threads, forks, exec, signals passed on. Under system call
// stops (guarded) also every call that could free or change T0 content: the range in its way is captured before it runs.
#include <errno.h>
#include <linux/audit.h>
#include <linux/mman.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "source_internal.h"

enum { NOTHING, RANGE, EVERYTHING };
enum { SHM_REMAP_FLAG = 040000, ROBUST_MOST = 2048, LAST_KNOWN_CALL = 467 };

struct in_the_way {
    int what;
    uint64_t start[2], end[2];
};

static void way_add(struct in_the_way *way, int slot, uint64_t start, uint64_t size) {
    way->what = RANGE;
    way->start[slot] = tm_page_floor(start);
    way->end[slot] = tm_page_ceil(start + size);
    if (way->end[slot] < way->start[slot]) way->end[slot] = UINT64_MAX;
}

static bool advice_is_harmless(uint64_t advice) {
    switch (advice) {
        case 0:  // NORMAL
        case 1:  // RANDOM
        case 2:  // SEQUENTIAL
        case 3:  // WILLNEED
        case 10: // DONTFORK
        case 11: // DOFORK
        case 13: // UNMERGEABLE
        case 14: // HUGEPAGE
        case 15: // NOHUGEPAGE
        case 16: // DONTDUMP
        case 17: // DODUMP
        case 20: // COLD
        case 21: // PAGEOUT
        case 22: // POPULATE_READ
        case 23: // POPULATE_WRITE
        case 25: // COLLAPSE
            return true;
        default:
            return false;
    }
}

// What of T0's memory the call could free or change other than by a store, which faults. Numbers that are not known here are
// taken to endanger everything.
static struct in_the_way call_endangers(const struct tm_source *source, const struct __ptrace_syscall_info *info) {
    struct in_the_way way = {.what = NOTHING};
    const __uint64_t *a = info->entry.args;
    if (info->arch != AUDIT_ARCH_X86_64 || info->entry.nr > LAST_KNOWN_CALL) {
        way.what = EVERYTHING;
        return way;
    }
    switch ((long)info->entry.nr) {
        case SYS_munmap:
            way_add(&way, 0, a[0], a[1]);
            break;
        case SYS_madvise:
            if (!advice_is_harmless(a[2])) way_add(&way, 0, a[0], a[1]);
            break;
        case SYS_mmap:
            if (a[3] & MAP_FIXED) way_add(&way, 0, a[0], a[1]);
            break;
        case SYS_mremap:
            way_add(&way, 0, a[0], a[1]);
            if (a[3] & MREMAP_FIXED) way_add(&way, 1, a[4], a[2]);
            break;
        case SYS_brk:
            for (uint32_t i = 0; a[0] && i < source->n_regions; i++)
                if (source->regions[i].face.kind == TM_HEAP && source->regions[i].face.end > a[0])
                    way_add(&way, 0, a[0], source->regions[i].face.end - a[0]);
            break;
        case SYS_shmat:
            if (a[2] & SHM_REMAP_FLAG) way.what = EVERYTHING;
            break;
        case SYS_execve:
        case SYS_execveat:
        case SYS_remap_file_pages:
        case SYS_process_madvise:
        case SYS_io_uring_setup:
        case SYS_io_uring_enter:
        case SYS_io_uring_register:
            way.what = EVERYTHING;
            break;
        default: // writes through the kernel fault like any other; nothing else touches private memory
            break;
    }
    return way;
}

// Room for one more among the requests and the released; with request_lock held.
static bool hold_room(struct tm_source *source) {
    if (source->n_held < source->requests_capacity) return true;
    uint32_t capacity = source->requests_capacity ? source->requests_capacity * 2 : 64;
    struct request *requests = malloc(capacity * sizeof *requests);
    pid_t *released = realloc(source->released, capacity * sizeof *released);
    if (released) source->released = released;
    if (!requests || !released) {
        free(requests);
        return false;
    }
    for (uint32_t i = 0; i < source->n_requests; i++)
        requests[i] = source->requests[(source->first_request + i) % source->requests_capacity];
    free(source->requests);
    source->requests = requests;
    source->requests_capacity = capacity;
    source->first_request = 0;
    return true;
}

static bool hold_for(struct tm_source *source, struct thread *thread, uint64_t start, uint64_t end) {
    if (!capture_needs(source, start, end)) return false;
    pthread_mutex_lock(&source->request_lock);
    bool room = hold_room(source);
    if (room) {
        uint32_t at = (source->first_request + source->n_requests++) % source->requests_capacity;
        source->requests[at] = (struct request){start, end, thread->tid};
        source->n_held++;
        pthread_cond_broadcast(&source->work);
    }
    pthread_mutex_unlock(&source->request_lock);
    if (!room) {
        struct tm_error error;
        tm_error_set(&error, TM_NOMEM, ENOMEM, "guard", "no memory to hold back a call that frees memory");
        capture_fail(source, &error);
        return false;
    }
    thread->held = thread->stopped = true;
    return true;
}

static void call_stop(struct tm_source *source, struct thread *thread) {
    atomic_fetch_add(&source->guard_stops, 1);
    struct __ptrace_syscall_info info;
    if (ptrace(PTRACE_GET_SYSCALL_INFO, thread->tid, (void *)sizeof info, &info) > 0 &&
        info.op == PTRACE_SYSCALL_INFO_ENTRY && atomic_load(&source->state) == TM_CAPTURING) {
        struct in_the_way way = call_endangers(source, &info);
        if (way.what == EVERYTHING && hold_for(source, thread, 0, UINT64_MAX)) return;
        if (way.what == RANGE) {
            uint64_t start = way.start[0], end = way.end[0];
            if (way.end[1] && capture_needs(source, way.start[1], way.end[1])) { // rare: one request for the hull
                if (way.start[1] < start) start = way.start[1];
                if (way.end[1] > end) end = way.end[1];
            }
            if (hold_for(source, thread, start, end)) return;
        }
    }
    thread_continue(thread, source->guarded, 0);
}

// The kernel refuses userfaultfd faults of an exiting task, silently: what it will write is captured and opened before.
static void exit_serve(struct tm_source *source, const struct thread *thread) {
    if (thread->clear_child_tid) capture_page_now(source, thread->clear_child_tid);
    uint64_t head = 0, length = 0;
    if (syscall(SYS_get_robust_list, thread->tid, &head, &length) || !head) return;
    struct {
        uint64_t next;
        int64_t offset;
        uint64_t pending;
    } list;
    if (target_read(source, head, &list, sizeof list)) return;
    uint64_t entry = list.next, offset = (uint64_t)list.offset;
    if (list.pending) capture_page_now(source, (list.pending & ~1ull) + offset);
    for (int i = 0; i < ROBUST_MOST && entry && (entry & ~1ull) != head; i++) {
        capture_page_now(source, (entry & ~1ull) + offset);
        if (target_read(source, entry & ~1ull, &entry, sizeof entry)) break;
    }
}

static bool last_thread(const struct tm_source *source, const struct thread *thread) {
    for (uint32_t i = 0; i < source->threads.n; i++) {
        const struct thread *other = &source->threads.at[i];
        if (other != thread && !other->exiting && !other->foreign) return false;
    }
    return true;
}

static void exit_stop(struct tm_source *source, struct thread *thread) {
    exit_serve(source, thread);
    thread->exiting = true;
    // With the last thread the memory would go: it waits until all is captured. Its memory is readable at this stop.
    if (!thread->foreign && last_thread(source, thread) && atomic_load(&source->state) == TM_CAPTURING &&
        capture_needs(source, 0, UINT64_MAX) && hold_for(source, thread, 0, UINT64_MAX))
        return;
    thread_continue(thread, false, 0);
}

// What clone was told to clear at the end of the new thread, from the registers of either side of the call.
static uint64_t clone_clears(const struct tm_source *source, const struct user_regs_struct *regs) {
    enum { CLEARTID = 0x00200000 };
    uint64_t flags = 0, child_tid = 0;
    if (regs->orig_rax == SYS_clone) {
        flags = regs->rdi;
        child_tid = regs->r10;
    } else if (regs->orig_rax == SYS_clone3) {
        uint64_t args[4];
        if (target_read(source, regs->rdi, args, sizeof args)) return 0;
        flags = args[0];
        child_tid = args[2];
    }
    return flags & CLEARTID ? child_tid : 0;
}

// The caller of clone, fork or vfork has stopped; remember what its new thread will have cleared at its end.
static void clone_stop(struct tm_source *source, struct thread *thread) {
    unsigned long child = 0;
    pid_t tid = thread->tid;
    if (thread_read_regs(thread, NULL) == TM_OK && ptrace(PTRACE_GETEVENTMSG, tid, NULL, &child) == 0 && child &&
        !threads_find(&source->threads, (pid_t)child) && thread_in_group(source, (pid_t)child)) {
        uint64_t clears = clone_clears(source, &thread->regs);
        struct thread *born = threads_add(&source->threads, (pid_t)child);
        if (born) {
            born->seized = true;
            born->clear_child_tid = clears;
        }
        thread = threads_find(&source->threads, tid); // the list may have moved
    }
    if (thread) thread_continue(thread, source->guarded, 0);
}

// First stop of something born traced. Threads are ours; a child with the same memory stays under the guard; others go.
static void newborn(struct tm_source *source, const struct stop *stop) {
    if (stop->kind == STOP_DEAD) return;
    bool ours = thread_in_group(source, stop->tid);
    if (!ours && !process_shares_memory(source, stop->tid)) {
        ptrace(PTRACE_DETACH, stop->tid, NULL, (void *)(long)(stop->kind == STOP_SIGNAL ? stop->signal : 0));
        return;
    }
    struct thread *thread = threads_add(&source->threads, stop->tid);
    if (!thread) {
        ptrace(PTRACE_DETACH, stop->tid, NULL, NULL);
        return;
    }
    thread->seized = true;
    thread->foreign = !ours;
    // It may end before its parent's stop is seen. The parent has not gone on, so clone3's arguments are still there.
    if (thread_read_regs(thread, NULL) == TM_OK) thread->clear_child_tid = clone_clears(source, &thread->regs);
    thread_continue(thread, source->guarded, 0);
}

static pid_t released_take(struct tm_source *source) {
    pthread_mutex_lock(&source->request_lock);
    pid_t tid = 0;
    if (source->n_released) {
        tid = source->released[--source->n_released];
        source->n_held--;
    }
    pthread_mutex_unlock(&source->request_lock);
    return tid;
}

void guard_release_held(struct tm_source *source) {
    atomic_store(&source->kick_wanted, false);
    for (pid_t tid; (tid = released_take(source));) {
        struct thread *thread = threads_find(&source->threads, tid);
        if (!thread || !thread->held) continue;
        thread->held = thread->stopped = false;
        thread_continue(thread, source->guarded && !thread->exiting, 0);
    }
}

// No harm where all of T0 has been read, and only the counting, or what the freeze copied, is behind.
static void target_ended(struct tm_source *source, const char *what) {
    atomic_store(&source->target_gone, true);
    if (!capture_needs(source, 0, UINT64_MAX)) return;
    struct tm_error error;
    tm_error_set(&error, TM_GONE, 0, "waitid", "%s before all of its memory was captured", what);
    capture_fail(source, &error);
}

static void dispatch(struct tm_source *source, const struct stop *stop) {
    struct thread *thread = threads_find(&source->threads, stop->tid);
    if (!thread) {
        newborn(source, stop);
        return;
    }
    thread->group = false;
    switch (stop->kind) {
        case STOP_DEAD:
            threads_remove(&source->threads, stop->tid);
            if (source->threads.n == 0 || stop->tid == source->pid) target_ended(source, "the process ended");
            return;
        case STOP_CALL:
            call_stop(source, thread);
            return;
        case STOP_EXIT:
            exit_stop(source, thread);
            return;
        case STOP_CLONE:
            clone_stop(source, thread);
            return;
        case STOP_EXEC:
            if (thread->foreign) {
                ptrace(PTRACE_DETACH, stop->tid, NULL, NULL);
                threads_remove(&source->threads, stop->tid);
                return;
            }
            // Captured at its entry under the guard; without it what was not captured is gone with the old memory.
            if (atomic_load(&source->state) == TM_CAPTURING)
                target_ended(source, "the process executed another program");
            thread_continue(thread, false, 0);
            return;
        case STOP_GROUP:
            thread->group = true;
            thread_continue(thread, source->guarded, 0);
            return;
        case STOP_SIGNAL:
            if (thread_read_regs(thread, NULL) == TM_OK) thread_mend_call(thread->tid, &thread->regs);
            thread_continue(thread, source->guarded, stop->signal);
            return;
        case STOP_TRAP:
            if (thread_read_regs(thread, NULL) == TM_OK) thread_mend_call(thread->tid, &thread->regs);
            thread_continue(thread, source->guarded, 0);
            return;
    }
}

void guard_step(struct tm_source *source) {
    guard_release_held(source);
    struct stop stop;
    int got = stop_wait(-1, false, &stop);
    if (got == 1)
        dispatch(source, &stop);
    else if (got == -1)
        target_ended(source, "the process ended");
}
