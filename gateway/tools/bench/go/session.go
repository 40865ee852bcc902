//go:build !before013

package main

import "github.com/emersion/go-smtp"

type backend struct{ conversation *conversation }

func (b backend) NewSession(*smtp.Conn) (smtp.Session, error) {
	return &session{keeper{taken: &b.conversation.taken}}, nil
}

type session struct{ keeper }

func (s *session) Mail(from string, _ *smtp.MailOptions) error {
	s.sender, s.recipients = from, nil
	return nil
}

func (s *session) Rcpt(to string, _ *smtp.RcptOptions) error {
	s.recipients = append(s.recipients, to)
	return nil
}
