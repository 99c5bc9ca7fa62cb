package localpg

import "syscall"

// endWithParent has the server end, as in a crash, with the thread that started it.
func endWithParent(attr *syscall.SysProcAttr) { attr.Pdeathsig = syscall.SIGQUIT }
