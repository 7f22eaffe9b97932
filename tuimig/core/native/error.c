// Filling struct tm_error, and what an errno means where the caller gives it no special meaning; starting threads.
// Owned by whoever calls; no state.
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "util.h"

int tm_error_set(struct tm_error *error, int code, int err, const char *where, const char *fmt, ...) {
    if (!error) {
        return code;
    }
    memset(error, 0, sizeof *error);
    error->code = code;
    error->err = err;
    snprintf(error->where, sizeof error->where, "%s", where);
    va_list arguments;
    va_start(arguments, fmt);
    vsnprintf(error->what, sizeof error->what, fmt, arguments);
    va_end(arguments);
    return code;
}

int tm_error_code(int err) {
    switch (err) {
        case 0:
            return TM_OK;
        case ESRCH:
            return TM_GONE;
        case EPERM:
        case EACCES:
        case ENOSYS:
            return TM_PRIVILEGE;
        case ENOSPC:
        case EDQUOT:
        case EFBIG:
            return TM_FULL;
        case ENOMEM:
            return TM_NOMEM;
        case ECANCELED:
            return TM_CANCELLED;
        default:
            return TM_SYS;
    }
}

int tm_thread_nice(int nice) { return setpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid), nice) ? errno : 0; }

int tm_thread_start(pthread_t *thread, const char *name, void *(*run)(void *), void *argument) {
    sigset_t all, before;
    sigfillset(&all);
    int failed = pthread_sigmask(SIG_SETMASK, &all, &before);
    if (failed) {
        return failed;
    }
    failed = pthread_create(thread, NULL, run, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!failed) {
        char cut[16];
        snprintf(cut, sizeof cut, "%s", name);
        pthread_setname_np(*thread, cut);
    }
    return failed;
}
