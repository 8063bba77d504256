package relay

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// A standIn answers a control socket as a test has it.
type standIn struct {
	t      *testing.T
	answer func(call, *net.UnixConn)
}

// A call as it came.
type call struct {
	text   string
	method string
	id     string
	socket *os.File
}

// standInFor starts a daemon that has answer called for each call, in a goroutine of its own.
func standInFor(t *testing.T, answer func(call, *net.UnixConn)) Daemon {
	t.Helper()
	path := filepath.Join(t.TempDir(), "control.sock")
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	s := &standIn{t, answer}
	go func() {
		for {
			connection, err := listener.AcceptUnix()
			if err != nil {
				return
			}
			go s.serve(connection)
		}
	}()
	return Daemon(path)
}

func (s *standIn) serve(connection *net.UnixConn) {
	defer connection.Close()
	var received call
	buffer, rights := make([]byte, 4096), make([]byte, 64)
	for {
		length, rightsLength, _, _, err := connection.ReadMsgUnix(buffer, rights)
		if err != nil {
			return
		}
		if rightsLength > 0 {
			received.socket = descriptor(s.t, rights[:rightsLength])
		}
		received.text += string(buffer[:length])
		if bytes.HasSuffix(buffer[:length], []byte{0}) {
			break
		}
	}
	var parsed struct {
		Method     string `json:"method"`
		Parameters byID   `json:"parameters"`
	}
	if err := json.Unmarshal([]byte(received.text[:len(received.text)-1]), &parsed); err != nil {
		s.t.Errorf("%q: %v", received.text, err)
	}
	received.method, received.id = filepath.Ext(parsed.Method)[1:], parsed.Parameters.ID
	s.answer(received, connection)
}

func descriptor(t *testing.T, rights []byte) *os.File {
	messages, err := syscall.ParseSocketControlMessage(rights)
	if err != nil || len(messages) != 1 {
		t.Errorf("%v: %v", messages, err)
		return nil
	}
	descriptors, err := syscall.ParseUnixRights(&messages[0])
	if err != nil || len(descriptors) != 1 {
		t.Errorf("%v: %v", descriptors, err)
		return nil
	}
	return os.NewFile(uintptr(descriptors[0]), "passed")
}

// says answers every call with the same bytes.
func says(text string) func(call, *net.UnixConn) {
	return func(_ call, connection *net.UnixConn) { io.WriteString(connection, text) }
}

const done = "{\"parameters\":{}}\x00"

func inState(id string, state State, continues bool) string {
	return fmt.Sprintf(`{"parameters":{"snapshot":{"id":%q,"state":%q,"reason":"why not"}},"continues":%v}`+"\x00", id, state, continues)
}

func soon(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}
