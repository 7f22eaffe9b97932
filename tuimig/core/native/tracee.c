// Threads of the target under ptrace: seize, stop, continue, let go. Only the tracer thread calls these.
// Signal delivery stops are never reaped: a signal that we had reaped would be lost if we were killed before handing it on.
#include "source_internal.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define DETACH_NS 5000000000ull
#define STOP_SPIN_NS 50000u

enum { DETACH_NAP_US = 20, STOP_NAP_US = 20 };
enum { RESTART_NO_HANDLER = 514 }; // ERESTARTNOHAND: again, or EINTR if a handler runs

struct thread *threads_find(struct threads *list, pid_t tid) {
    for (uint32_t i = 0; i < list->n; i++)
        if (list->at[i].tid == tid) return &list->at[i];
    return NULL;
}

struct thread *threads_add(struct threads *list, pid_t tid) {
    if (list->n == list->capacity) {
        uint32_t capacity = list->capacity ? list->capacity * 2 : 64;
        struct thread *at = realloc(list->at, capacity * sizeof *at);
        if (!at) return NULL;
        list->at = at;
        list->capacity = capacity;
    }
    struct thread *thread = &list->at[list->n++];
    *thread = (struct thread){.tid = tid};
    return thread;
}

void threads_remove(struct threads *list, pid_t tid) {
    struct thread *thread = threads_find(list, tid);
    if (!thread) return;
    *thread = list->at[--list->n];
}

static bool stops_a_group(int signal) {
    return signal == SIGSTOP || signal == SIGTSTP || signal == SIGTTIN || signal == SIGTTOU;
}

static void stop_classify(const siginfo_t *info, struct stop *out) {
    *out = (struct stop){.tid = info->si_pid};
    int status = info->si_status;
    int signal = status & 0xff;
    out->event = status >> 8;
    if (info->si_code == CLD_EXITED || info->si_code == CLD_KILLED || info->si_code == CLD_DUMPED) {
        out->kind = STOP_DEAD;
    } else if (signal == (SIGTRAP | 0x80)) {
        out->kind = STOP_CALL;
    } else if (out->event == PTRACE_EVENT_STOP) {
        out->kind = stops_a_group(signal) ? STOP_GROUP : STOP_TRAP;
        out->signal = signal;
    } else if (out->event == PTRACE_EVENT_EXIT) {
        out->kind = STOP_EXIT;
    } else if (out->event == PTRACE_EVENT_EXEC) {
        out->kind = STOP_EXEC;
    } else if (out->event) {
        out->kind = STOP_CLONE;
    } else {
        out->kind = STOP_SIGNAL;
        out->signal = signal;
    }
}

int stop_wait(pid_t tid, bool no_hang, struct stop *out) {
    int options = WSTOPPED | WEXITED | WNOWAIT | __WALL | __WNOTHREAD | (no_hang ? WNOHANG : 0);
    siginfo_t info = {0};
    if (waitid(tid < 0 ? P_ALL : P_PID, tid < 0 ? 0 : (id_t)tid, &info, options)) return errno == EINTR ? -2 : -1;
    if (info.si_pid == 0) return 0;
    stop_classify(&info, out);
    if (out->kind != STOP_SIGNAL) { // harmless to lose: reap it, so that it is not seen again
        siginfo_t taken = {0};
        int failed = waitid(P_PID, (id_t)out->tid, &taken, WSTOPPED | WEXITED | __WALL | __WNOTHREAD | WNOHANG);
        if (!failed && taken.si_pid) stop_classify(&taken, out); // a SIGKILL or SIGCONT may have come in between
    }
    return 1;
}

int thread_seize(pid_t tid, unsigned long options) {
    return ptrace(PTRACE_SEIZE, tid, NULL, (void *)(options | PTRACE_O_TRACESYSGOOD)) ? errno : 0;
}

int thread_continue(const struct thread *thread, bool to_call, int signal) {
    long how = thread->group && !signal ? PTRACE_LISTEN : to_call ? PTRACE_SYSCALL : PTRACE_CONT;
    return ptrace(how, thread->tid, NULL, (void *)(long)signal) ? errno : 0;
}

int thread_read_regs(struct thread *thread, struct tm_error *error) {
    if (ptrace(PTRACE_GETREGS, thread->tid, NULL, &thread->regs)) {
        int code = tm_error_errno(error, "PTRACE_GETREGS", "cannot read the registers");
        if (error) error->tid = thread->tid;
        return code;
    }
    return TM_OK;
}

// Calls that end with EINTR on any stop and are never restarted by the kernel (signal(7)); a stop of ours must not show.
static bool call_restarts_with_eintr(const struct user_regs_struct *regs) {
    if ((long)regs->rax != -EINTR) return false;
    switch ((long)regs->orig_rax) {
        case SYS_epoll_wait:
        case SYS_epoll_pwait:
        case SYS_epoll_pwait2:
        case SYS_semop:
        case SYS_semtimedop:
        case SYS_rt_sigtimedwait:
        case SYS_io_getevents:
        case SYS_io_pgetevents:
        case SYS_msgrcv:
        case SYS_msgsnd:
        case SYS_read: // inotify, and sockets with a time-out, as the calls below
        case SYS_readv:
        case SYS_write:
        case SYS_writev:
        case SYS_recvfrom:
        case SYS_recvmsg:
        case SYS_recvmmsg:
        case SYS_sendto:
        case SYS_sendmsg:
        case SYS_sendmmsg:
        case SYS_accept:
        case SYS_accept4:
        case SYS_connect:
            return true;
        default:
            return false;
    }
}

// At an event or signal stop: undo what the stop did to the thread's call. The kernel restarts it, or a handler that runs
// makes it EINTR; an ignored signal, which is reported only because we trace, does not.
void thread_mend_call(pid_t tid, struct user_regs_struct *regs) {
    if (!call_restarts_with_eintr(regs)) return;
    regs->rax = (unsigned long long)-RESTART_NO_HANDLER;
    ptrace(PTRACE_SETREGS, tid, NULL, regs);
}

// A thread has come to rest for us: take note of its registers.
static int thread_settle(struct thread *thread, bool group, struct tm_error *error) {
    thread->stopped = true;
    thread->group = group;
    int code = thread_read_regs(thread, error);
    if (!code) thread_mend_call(thread->tid, &thread->regs);
    return code;
}

bool thread_in_group(const struct tm_source *source, pid_t tid) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/task/%d", source->pid, tid);
    return access(path, F_OK) == 0;
}

bool process_shares_memory(const struct tm_source *source, pid_t pid) {
    enum { KCMP_VM_TYPE = 1 };
    return syscall(SYS_kcmp, source->pid, pid, KCMP_VM_TYPE, 0, 0) == 0;
}

// The child of a fork that was under way when its parent was seized: traced from birth, but no part of the process.
static int newborn_process(struct tm_source *source, const struct stop *stop, struct tm_error *error) {
    bool shares = process_shares_memory(source, stop->tid);
    ptrace(PTRACE_DETACH, stop->tid, NULL, (void *)(long)(stop->kind == STOP_SIGNAL ? stop->signal : 0));
    if (!shares) return TM_OK;
    tm_error_set(error, TM_DEADLINE, 0, "PTRACE_SEIZE", "process %d has just been started and shares its memory",
                 stop->tid);
    if (error) error->tid = stop->tid;
    return TM_DEADLINE;
}

// One stop on the way to rest. The interrupt is used up by any stop, so it is asked for again.
static int thread_towards_rest(struct tm_source *source, const struct stop *stop, struct tm_error *error) {
    struct thread *thread = threads_find(&source->threads, stop->tid);
    if (!thread) {
        if (stop->kind == STOP_DEAD) return TM_OK;
        if (!thread_in_group(source, stop->tid)) return newborn_process(source, stop, error);
        thread = threads_add(&source->threads, stop->tid); // a new one, traced from birth
        if (!thread) return tm_error_set(error, TM_NOMEM, 0, "realloc", "no memory for the thread list");
        thread->seized = true;
    }
    switch (stop->kind) {
        case STOP_DEAD:
            threads_remove(&source->threads, stop->tid);
            return TM_OK;
        case STOP_TRAP:
        case STOP_GROUP:
            return thread_settle(thread, stop->kind == STOP_GROUP, error);
        case STOP_EXEC:
            atomic_store(&source->target_gone, true);
            ptrace(PTRACE_CONT, stop->tid, NULL, NULL);
            return tm_error_set(error, TM_GONE, 0, "PTRACE_EVENT_EXEC", "the process has executed another program");
        case STOP_EXIT:
            thread->exiting = true;
            break;
        default:
            break;
    }
    thread->group = false;
    if (!thread->exiting) ptrace(PTRACE_INTERRUPT, thread->tid, NULL, NULL);
    thread_continue(thread, false, stop->kind == STOP_SIGNAL ? stop->signal : 0);
    return TM_OK;
}

// Seize and interrupt what /proc lists and we do not hold yet. Returns how many were new, or -code.
static int threads_take_new(struct tm_source *source, unsigned long options, struct tm_error *error) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/task", source->pid);
    DIR *dir = opendir(path);
    if (!dir) return -tm_error_set(error, TM_GONE, errno, "opendir", "the process has ended");
    int taken = 0;
    for (struct dirent *entry; (entry = readdir(dir));) {
        pid_t tid = (pid_t)strtol(entry->d_name, NULL, 10);
        if (tid <= 0 || threads_find(&source->threads, tid)) continue;
        int err = thread_seize(tid, options);
        if (err == ESRCH) continue;
        if (err == EPERM) { // a thread born traced shows here before its first stop; anything else is a refusal
            struct stop stop;
            int got = stop_wait(tid, true, &stop);
            if (got == 1) { // and its stop has been reaped by this
                int code = thread_towards_rest(source, &stop, error);
                if (code) {
                    closedir(dir);
                    return -code;
                }
                taken++;
                continue;
            }
            if (got != -1) {
                if (!threads_add(&source->threads, tid)) break;
                source->threads.at[source->threads.n - 1].seized = true;
                ptrace(PTRACE_INTERRUPT, tid, NULL, NULL);
                taken++;
                continue;
            }
            char stat[256], state = 0;
            snprintf(path, sizeof path, "/proc/%d/task/%d/stat", source->pid, tid);
            FILE *file = fopen(path, "re");
            if (file) {
                if (fgets(stat, sizeof stat, file)) {
                    char *mark = strrchr(stat, ')');
                    if (mark) state = mark[2];
                }
                fclose(file);
            }
            if (state == 'Z' || state == 'X' || state == 0) continue;
        }
        if (err) {
            closedir(dir);
            int code = tm_error_set(error, tm_error_code(err), err, "PTRACE_SEIZE", "cannot attach to a thread");
            if (error) error->tid = tid;
            return -code;
        }
        struct thread *thread = threads_add(&source->threads, tid);
        if (!thread) break;
        thread->seized = true;
        ptrace(PTRACE_INTERRUPT, tid, NULL, NULL);
        taken++;
    }
    closedir(dir);
    return taken;
}

static uint32_t threads_running(const struct threads *list, pid_t *example) {
    uint32_t n = 0;
    for (uint32_t i = 0; i < list->n; i++)
        if (!list->at[i].stopped) {
            n++;
            *example = list->at[i].tid;
        }
    return n;
}

static int deadline_missed(struct tm_source *source, pid_t tid, struct tm_error *error) {
    char path[64], call[128] = "?";
    snprintf(path, sizeof path, "/proc/%d/task/%d/syscall", source->pid, tid);
    FILE *file = fopen(path, "re");
    if (file) {
        if (!fgets(call, sizeof call, file)) call[0] = 0;
        fclose(file);
        call[strcspn(call, " \n")] = 0;
    }
    tm_error_set(error, TM_DEADLINE, 0, "PTRACE_INTERRUPT", "thread %d did not stop in time (system call %s)", tid,
                 call);
    if (error) error->tid = tid;
    return TM_DEADLINE;
}

int threads_stop_all(struct tm_source *source, unsigned long options, uint64_t deadline_ns, struct tm_error *error) {
    source->trace_options = options | PTRACE_O_TRACESYSGOOD;
    for (uint32_t i = 0; i < source->threads.n; i++)
        if (!source->threads.at[i].stopped) ptrace(PTRACE_INTERRUPT, source->threads.at[i].tid, NULL, NULL);
    for (;;) {
        int taken = threads_take_new(source, options, error);
        if (taken < 0) return -taken;
        pid_t example = 0;
        if (taken == 0 && threads_running(&source->threads, &example) == 0) break;
        uint64_t last = tm_now_ns();
        while (threads_running(&source->threads, &example)) {
            struct stop stop;
            int got = stop_wait(-1, true, &stop);
            uint64_t now = tm_now_ns();
            if (got == 1) {
                int code = thread_towards_rest(source, &stop, error);
                if (code) return code;
                last = now;
            } else if (got == -1) {
                break;
            } else if (now > deadline_ns) {
                return deadline_missed(source, example, error);
            } else if (now - last > STOP_SPIN_NS) { // it may be waiting for this very CPU
                usleep(STOP_NAP_US);
            }
        }
    }
    if (source->threads.n == 0) return tm_error_set(error, TM_GONE, 0, "PTRACE_SEIZE", "the process has ended");
    return TM_OK;
}

int thread_stop_one(struct thread *thread, uint64_t deadline_ns, struct tm_error *error) {
    ptrace(PTRACE_INTERRUPT, thread->tid, NULL, NULL);
    for (;;) {
        struct stop stop;
        int got = stop_wait(thread->tid, true, &stop);
        if (got == 1) {
            if (stop.kind == STOP_DEAD) return tm_error_set(error, TM_GONE, 0, "waitid", "the thread has ended");
            if (stop.kind == STOP_TRAP || stop.kind == STOP_GROUP)
                return thread_settle(thread, stop.kind == STOP_GROUP, error);
            thread->group = false;
            ptrace(PTRACE_INTERRUPT, thread->tid, NULL, NULL);
            thread_continue(thread, false, stop.kind == STOP_SIGNAL ? stop.signal : 0);
        } else if (got == -1) {
            return tm_error_set(error, TM_GONE, errno, "waitid", "the thread is not ours any more");
        } else if (tm_now_ns() > deadline_ns) {
            tm_error_set(error, TM_DEADLINE, 0, "PTRACE_INTERRUPT", "thread %d did not stop in time", thread->tid);
            return TM_DEADLINE;
        }
    }
}

// The caller of clone or fork may be seen before the first stop of what it made, which is traced from birth.
static void born_expect(struct threads *list, pid_t parent) {
    unsigned long child = 0;
    if (ptrace(PTRACE_GETEVENTMSG, parent, NULL, &child) || !child || threads_find(list, (pid_t)child)) return;
    siginfo_t info = {0};
    int options = WSTOPPED | WEXITED | WNOWAIT | WNOHANG | __WALL | __WNOTHREAD;
    if (waitid(P_PID, (id_t)child, &info, options) == 0) threads_add(list, (pid_t)child); // else it was let go before
}

static void detach_at(struct threads *list, const struct stop *stop) {
    if (stop->kind ==
        STOP_CALL) { // a call that our interrupt ended with EINTR is mended at the event stop that follows
        ptrace(PTRACE_INTERRUPT, stop->tid, NULL, NULL);
        ptrace(PTRACE_CONT, stop->tid, NULL, NULL);
        return;
    }
    if (stop->kind == STOP_CLONE) born_expect(list, stop->tid);
    if (stop->kind != STOP_DEAD) {
        struct user_regs_struct regs;
        bool at_call = stop->kind == STOP_TRAP || stop->kind == STOP_GROUP || stop->kind == STOP_SIGNAL;
        if (at_call && ptrace(PTRACE_GETREGS, stop->tid, NULL, &regs) == 0) thread_mend_call(stop->tid, &regs);
        ptrace(PTRACE_DETACH, stop->tid, NULL, (void *)(long)(stop->kind == STOP_SIGNAL ? stop->signal : 0));
    }
    threads_remove(list, stop->tid);
}

// DETACH needs a stop: each thread is interrupted once more, and let go at whatever stop it shows, in whatever order they come:
// the parent of a vfork stops only after its child, which may itself wait for us.
void threads_detach_all(struct tm_source *source) {
    struct threads *list = &source->threads;
    for (uint32_t i = 0; i < list->n; i++)
        if (!list->at[i].stopped) ptrace(PTRACE_INTERRUPT, list->at[i].tid, NULL, NULL);
    for (uint32_t i = list->n; i-- > 0;) {
        // A first thread that ended before the others stops no more, and is not reported until they have ended too.
        bool stays = list->at[i].exiting && list->at[i].tid == source->pid;
        if (!list->at[i].stopped && !stays) continue;
        if (list->at[i].stopped) ptrace(PTRACE_DETACH, list->at[i].tid, NULL, NULL);
        list->at[i] = list->at[--list->n];
    }
    // One that cannot stop for so long (in the kernel, or waiting for a vfork child) is let go by the tracer thread's end.
    uint64_t give_up = tm_now_ns() + DETACH_NS;
    struct stop stop;
    for (int got; (got = stop_wait(-1, true, &stop)) != -1 && tm_now_ns() < give_up;) {
        if (got == 1)
            detach_at(list, &stop);
        else if (list->n == 0)
            break;
        else
            usleep(DETACH_NAP_US);
    }
    list->n = 0;
}
